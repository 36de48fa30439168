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

    The last token of a sequence is only predicted, never read, so it is no node. A sequence shares
    what it has in common with the one added before it, so that sorted ones share all they can.

    Attributes:
        ids: (n) the nodes' tokens. A node comes after its parent.
        positions: (n) their places in their sequences, from 0.
        predictors: (m) the nodes after which a scored token comes.
        targets: (m) these tokens.
        paths: By sequence, the places of its scored tokens in `targets`, in order.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.paths: dict[Any, list[int]] = {}
        self._runs: list[tuple[int, int]] = []  # (parent, first node of a row of descendants)
        # Of the sequence before: its tokens and nodes, and its scored tokens' places by position.
        self._ids: Sequence[int] = ()
        self._nodes: list[int] = []
        self._places: list[int | None] = []

    def add(self, key: Any, ids: Sequence[int], n_prompt: int) -> None:
        """Add a sequence; all tokens from `n_prompt` on are scored, but never the first."""
        common = _common_length(self._ids, ids)
        shared = min(common, len(self._nodes), len(ids) - 1)
        first, new = len(self.ids), ids[shared:-1]
        if new:
            self._runs.append((self._nodes[shared - 1] if shared else -1, first))
        self.ids += new
        self.positions += range(shared, shared + len(new))
        self._nodes = self._nodes[:shared] + list(range(first, len(self.ids)))
        scored = max(1, n_prompt)
        known = [*self._places[:common], *[None] * (len(ids) - common)]
        self._places = [
            self._place(position, token, place) if position >= scored else None
            for position, (token, place) in enumerate(zip(ids, known, strict=True))
        ]
        self._ids = ids
        self.paths[key] = [place for place in self._places if place is not None]

    def mask(self) -> Tensor:
        """Which nodes (rows) see which (columns), (n, n) bool: its ancestors and itself."""
        mask = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        stops = [start for _, start in self._runs[1:]] + [len(self.ids)]
        for (parent, start), stop in zip(self._runs, stops, strict=True):
            if parent >= 0:
                mask[start:stop, :start] = mask[parent, :start]
            mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        return mask

    def _place(self, position: int, token: int, known: int | None) -> int:
        """Give the place of a scored token in `targets`: the known one, or a new one."""
        if known is not None:
            return known
        self.predictors.append(self._nodes[position - 1])
        self.targets.append(token)
        return len(self.targets) - 1


def _common_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
