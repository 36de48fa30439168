"""What a kernel is given: the tensors of one parameter, flat and on one device. No logic."""

from typing import NamedTuple

from torch import Tensor

from unlearn_llm.optim.update import BaseOrder


class Stored(NamedTuple):
    """A pair of moments as it is kept between steps.

    Either float32 (float64 for float64 parameters) without scales, or uint8 codes with a float32
    scale per block of `codec.BLOCK` entries; the last block may be short.
    """

    mean: Tensor
    """(n,)"""
    square: Tensor
    """(n,)"""
    mean_scale: Tensor | None = None
    """(ceil(n / BLOCK),)"""
    square_scale: Tensor | None = None
    """(ceil(n / BLOCK),)"""


class Task(NamedTuple):
    """One parameter in one step; all tensors are contiguous and changed in place, but the grad."""

    param: Tensor
    """(n,) any float dtype."""
    grad: Tensor
    """(n,) any float dtype."""
    moments: Stored
    """Of the step's role: the deltas, in DualOptim+."""
    base: Stored | None
    """Shared by the roles; None in DualOptim."""
    noise_key: int
    """For stochastic rounding; see `noise`."""


class Rule(NamedTuple):
    """What all steps of a parameter group have in common; a kernel is built per rule.

    The mean's code is signed. The square's code is unsigned in the base and in DualOptim, and
    signed in DualOptim+'s deltas, which may be negative.
    """

    base_order: BaseOrder = "lagged"
    max_update: float | None = None
    stochastic: bool = False
    """Round codes stochastically."""
    observe: bool = True
    """Return what DualOptim+ met."""
