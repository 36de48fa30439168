"""SalUn's mask: the entries with the largest gradient of the forget set."""

import struct
from collections.abc import Sequence

from torch import Tensor

from unlearn_llm.combine.base import check_number
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.masks.base import MASKS, Gradients, Mask

INFINITY = 0x7F800000
"""The bits of a float32 infinity."""


class SalUn(Mask):
    """The share of all entries with the largest |mean gradient| on the forget set may move.

    Holds the others in forget and retain steps. A fresh LoRA adapter has a gradient of 0 in its A
    matrices, so the B matrices are chosen first.

    Args:
        share: Of the entries of all parameters together, more than 0, at most 1.
        minus_retain: Rank by |mean gradient on the forget set| - |mean gradient on the retain
            set|, which takes one more pass, over the retain set.

    Source: Fan et al. 2024 (SalUn), arXiv:2310.12508; OPTML-Group/Unlearn-Saliency
        generate_mask.py. `minus_retain`: CityU-MLO/DualOptim ImageClassification/generate_mask.py.
    Differs: gradients are token means over all rows, exact for every batch size, at weights that
        stand still (the authors' script takes optimiser steps while it collects them). Entries
        that are not chosen keep their value, as in the paper's eq. (5); in the released code
        weight decay moves them.
    """

    def __init__(self, share: float = 0.5, minus_retain: bool = False) -> None:
        self.share = check_number("share", share, least=0, most=1)
        if self.share == 0:
            raise UserError("share: expected more than 0, or nothing would train; got 0.")
        self.minus_retain = minus_retain

    def choose(self, gradients: Gradients) -> list[Tensor]:
        """Choose the top share over all tensors; ties in the order of the parameters."""
        saliency = [gradient.abs_() for gradient in gradients.mean("forget")]
        if self.minus_retain:
            for ours, theirs in zip(saliency, gradients.mean("retain"), strict=True):
                ours -= theirs.abs_()
        if not all(bool(values.isfinite().all()) for values in saliency):
            raise NonFiniteError(
                "mask: the gradient of the forget set is not finite at the weights the run starts "
                "from. Nothing was trained."
            )
        return largest(saliency, int(self.share * sum(values.numel() for values in saliency)))


def largest(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` largest entries of all tensors together, float32; ties in order.

    Exact, and without the sorted copy of all entries that a rank would need.
    """
    least = _kth_largest(values, count)
    ties = count - sum(int((part > least).sum()) for part in values)
    masks = []
    for part in values:
        mask = part > least
        if ties:
            tied = (part == least).flatten().nonzero().flatten()[:ties]
            mask.view(-1)[tied] = True
            ties -= len(tied)
        masks.append(mask)
    return masks


def _kth_largest(values: Sequence[Tensor], count: int) -> float:
    """The largest float32 that at least `count` entries reach: bisection over its 2^32 bits."""
    low, high = -INFINITY - 1, INFINITY  # all entries reach minus infinity, none plus infinity
    while high - low > 1:
        middle = (low + high) // 2
        bound = _float_at(middle)
        if sum(int((part >= bound).sum()) for part in values) >= count:
            low = middle
        else:
            high = middle
    return _float_at(low)


def _float_at(place: int) -> float:
    """The float32 at a place in the order of all float32; 0.0 stands at 0."""
    bits = place if place >= 0 else -1 - place  # -0.0 stands at -1
    magnitude: float = struct.unpack("f", struct.pack("i", bits))[0]
    return magnitude if place >= 0 else -magnitude


MASKS.add("salun", SalUn)
