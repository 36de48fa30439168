"""Gradients as vectors: products over all tensors, and blends of two. Knows of no method."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Gradient = Sequence[Tensor]
"""One tensor per trainable parameter, in the order of the parameters: one long vector."""

Reduce = Callable[[Tensor], Tensor]
"""Adds up a tensor of partial sums over the ranks that hold shards of the parameters."""

CHUNK = 2**20


def whole(partial_sums: Tensor) -> Tensor:
    """Reduce where nothing is sharded: every rank holds whole gradients (one process, DDP)."""
    return partial_sums


class Gram(NamedTuple):
    """The products of a forget and a retain gradient with themselves and with each other."""

    forget: float
    cross: float
    retain: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 0 if one of them is zero."""
        return self.cross * inverse(math.sqrt(self.forget)) * inverse(math.sqrt(self.retain))


class Coefficients(NamedTuple):
    """A blend of two gradients: `forget * g_f + retain * g_r`."""

    forget: float
    retain: float


def dots(pairs: Iterable[tuple[Gradient, Gradient]], reduce: Reduce = whole) -> list[float]:
    """Give the inner product of each pair over all parameters.

    Products are float32 (float64 for float64) and summed in chunks; the chunks in float64.
    Sharded tensors (DTensor) contribute their local shard, so `reduce` must add up the ranks.
    """
    partial_sums = [
        torch.stack([_dot(a, b) for a, b in zip(one, other, strict=True)]).sum()
        for one, other in pairs
    ]
    products: list[float] = reduce(torch.stack(partial_sums)).tolist()
    return products


def gram(forget: Gradient, retain: Gradient, reduce: Reduce = whole) -> Gram:
    """Give the products of two gradients. Not a number anywhere makes all of them so."""
    found = Gram(*dots([(forget, forget), (forget, retain), (retain, retain)], reduce))
    # Comparisons with nan are False, which would pass for "no conflict".
    return found if all(map(math.isfinite, found)) else Gram(math.nan, math.nan, math.nan)


def blend(forget: Gradient, retain: Gradient, by: Coefficients) -> Gradient:
    """Give `by.forget * forget + by.retain * retain`, written over `retain`."""
    for one, other in zip(forget, retain, strict=True):
        other.mul_(by.retain).add_(one, alpha=by.forget)
    return retain


def inverse(number: float) -> float:
    """Give 1 / number; 0 for 0: a gradient that is zero has no direction to contribute."""
    return 0.0 if number == 0 else 1 / number


def _dot(one: Tensor, other: Tensor) -> Tensor:
    one, other = _local(one), _local(other)
    dtype = torch.promote_types(one.dtype, torch.float32)
    parts = [
        torch.dot(a.to(dtype), b.to(dtype))
        for a, b in zip(torch.split(one, CHUNK), torch.split(other, CHUNK), strict=True)
    ]
    return torch.stack(parts).double().sum()


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten()
