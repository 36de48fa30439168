"""How far the weights of a release are from those that were to be unlearned."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from unlearn_llm.errors import UserError
from unlearn_llm.negate import B_MATRICES, Weights


@dataclass(frozen=True)
class Change:
    """What was compared, tensor by tensor.

    Attributes:
        tensors: How many.
        changed: How many are not the original's, bit for bit.
        distance: Norm of the difference over the norm of the original; None of an adapter by
            itself, which changes a base that is not at hand here.
    """

    tensors: int
    changed: int
    distance: float | None

    def __str__(self) -> str:
        apart = f", relative distance {self.distance:.3g}" if self.distance is not None else ""
        return f"{self.changed} of {self.tensors} tensors changed{apart}"


def change(original: Path, released: Path) -> Change:
    """Compare two models, or two adapters of one base.

    Weights are compared in the precision that is released, so that rounding alone is no change.
    One that has another shape, as embeddings have that grew, counts as changed, without a distance.

    Raises:
        UserError: a folder without safetensors, or two that are not the same model.
    """
    with ExitStack() as stack:
        before, after = Weights(original, stack), Weights(released, stack)
        # A head that is tied to the embeddings may be saved by one and not by the other.
        shared = [name for name in after if name in before]
        alike = [name for name in shared if before.shape(name) == after.shape(name)]
        if 2 * len(alike) <= len(list(after)):
            raise UserError(
                f"{original} and {released} are not the same model: {len(alike)} of "
                f"{len(list(after))} tensors have the same name and shape. Give --original."
            )
        moved, size, changed = 0.0, 0.0, len(shared) - len(alike)
        for name in tqdm(alike, desc="compare", unit="tensor", leave=False):
            ours, theirs = after[name], before[name].to(after[name].dtype)
            changed += not torch.equal(ours, theirs)
            moved += _square(ours.float() - theirs.float())
            size += _square(theirs)
    return Change(len(shared), changed, math.sqrt(moved / size) if size else None)


def change_by_adapter(adapter: Path) -> Change:
    """Say whether an adapter does anything: with B = 0, as it begins, it does not."""
    with ExitStack() as stack:
        weights = Weights(adapter, stack)
        acting = [name for name in weights if any(part in name for part in B_MATRICES)]
        acting = acting or list(weights)
        changed = sum(bool(weights[name].any()) for name in acting)
    return Change(len(acting), changed, None)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float(), dtype=torch.float64)) ** 2
