"""Sampling whose draws do not depend on the batch: every row has a generator of its own."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class GumbelNoise(LogitsProcessor):
    """Turns greedy choice into sampling: the largest of logits / temperature + Gumbel noise.

    Source: the Gumbel-max trick (Gumbel 1954). Differs: no difference.
    """

    def __init__(self, seeds: Sequence[str], temperature: float, device: torch.device) -> None:
        """Give row i of the batch the generator that `seeds[i]` names."""
        self.temperature = temperature
        self.generators = [
            torch.Generator(device).manual_seed(random.Random(seed).getrandbits(63))
            for seed in seeds
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Add noise to the logits of one step, (B, V)."""
        noise = torch.stack([self._gumbel(scores[0].float(), one) for one in self.generators])
        return scores.float() / self.temperature + noise

    def _gumbel(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return -torch.empty_like(like).exponential_(generator=generator).log()
