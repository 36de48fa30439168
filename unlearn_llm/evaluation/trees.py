"""Answers to one question as one row of a batch: every beginning that they share stands once.

The answers of a TOFU question have 3 of 7 tokens in common: the prompt, and the first words of
wrong answers. A model that gets the right mask and positions computes them once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Tree:
    """Token sequences, each a path from the root; a node is a token that the model reads.

    The last token of a sequence is only predicted, never read, so it is no node.

    Attributes:
        ids: (n) the nodes' tokens. A node comes after its parent.
        positions: (n) their places in their sequences, from 0.
        predictors: (m) the nodes after which a scored token comes, a pair of node and token once.
        targets: (m) these tokens.
        paths: By sequence, the places of its scored tokens in `targets`, in order.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.paths: dict[Any, list[int]] = {}
        self._children: dict[tuple[int, int], int] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._runs: list[tuple[int, int]] = []  # (parent, first node of its new descendants)

    def add(self, key: Any, ids: Sequence[int], n_prompt: int) -> None:
        """Add a sequence; all tokens from `n_prompt` on are scored, but never the first."""
        path, node = [], -1
        for position, token in enumerate(ids):
            if position >= max(1, n_prompt):
                path.append(self._place(node, token))
            if position < len(ids) - 1:
                node = self._child(node, token, position)
        self.paths[key] = path

    def mask(self) -> Tensor:
        """Which nodes (rows) see which (columns), (n, n) bool: its ancestors and itself."""
        mask = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        stops = [start for _, start in self._runs[1:]] + [len(self.ids)]
        for (parent, start), stop in zip(self._runs, stops, strict=True):
            if parent >= 0:
                mask[start:stop, :start] = mask[parent, :start]
            mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        return mask

    def _child(self, node: int, token: int, position: int) -> int:
        """Find the token after a node, or make it a new node."""
        child = self._children.get((node, token))
        if child is None:
            child = len(self.ids)
            if node != child - 1 or child == 0:  # else it goes on where the last one ended
                self._runs.append((node, child))
            self._children[node, token] = child
            self.ids.append(token)
            self.positions.append(position)
        return child

    def _place(self, node: int, token: int) -> int:
        place = self._places.setdefault((node, token), len(self.targets))
        if place == len(self.targets):
            self.predictors.append(node)
            self.targets.append(token)
        return place
