"""Batches for asking a model: sorted by length, within a budget of tokens, halved if too large."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

T = TypeVar("T")

MULTIPLE = 16
"""Padded lengths are rounded up to a multiple of this, so that few distinct shapes occur."""


class Item(NamedTuple):
    """One row of a batch, in tokens."""

    key: Any
    ids: list[int]


def batches(items: Sequence[Item], budget: int, extra: int = 0) -> Iterator[list[Item]]:
    """Cut items, longest first, into batches of at most `budget` tokens with padding.

    Args:
        extra: Tokens that each row will get on top of its padded length.
    """
    # The longest first: what does not fit into memory shows at once and not at the end.
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    while ordered:
        width = -(-len(ordered[0].ids) // MULTIPLE) * MULTIPLE + extra
        rows = max(1, budget // width)
        yield ordered[:rows]
        ordered = ordered[rows:]


def halving(function: Callable[[Sequence[T]], list[Any]], batch: Sequence[T]) -> Iterator[Any]:
    """Call a function on a batch, or on ever smaller parts of it when memory runs out."""
    try:
        result = function(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    else:
        yield result
        return
    # Outside of the handler, which would keep the failed call's tensors alive.
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from halving(function, half)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
