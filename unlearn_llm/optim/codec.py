"""Eight bits for a number of an optimiser state: the dynamic code, in blocks of 256.

A block keeps its largest magnitude in float32 and one byte per entry, an index into a fixed table
of 256 values between -1 (or 0) and 1. The bytes mean what they mean in bitsandbytes: its states
can be read here and the other way round.

The table is a decimal floating-point format: seven decades, each with twice as many equidistant
values as the one below. So the map from index to value is convex and made of straight lines, and
its inverse is concave; `LINES` has both, for kernels that compute faster than they look up.
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7


class Line(NamedTuple):
    """slope * x + offset."""

    slope: float
    offset: float


class Code(NamedTuple):
    """The lines of one table, by increasing index.

    With i the index of a magnitude (0 is zero, 1 the smallest value):
    value(i) = min(1, max(0, line(i) of `decode`)), the largest of the lines;
    i(value) = the smallest of the lines of `encode`, or `top` where that is larger; it is a whole
    number at every value of the table and linear in between. Its integer part after adding 1/2 is
    the nearest index, after adding a uniform number from [0, 1) an unbiased one.
    """

    decode: tuple[Line, ...]
    encode: tuple[Line, ...]
    top: Line
    """Joins the last value of the last decade with 1, which both tables end with."""


def _lines(first: int) -> Code:
    """Make the lines of a table whose first decade has `first` values."""

    def value(decade: int, position: float) -> float:
        return math.pow(10, decade - DECADES + 1) * (
            0.1 + 0.9 * position / math.ldexp(first, decade)
        )

    decode, encode = [], []
    index, last = 0, 0.0  # of the value before this decade's
    for decade in range(DECADES):
        count = first * 2**decade
        lowest, highest = value(decade, 0.5), value(decade, count - 0.5)
        spacing = value(decade, 1.0) - value(decade, 0.0)
        encode.append(_through(last, index, 1 / (lowest - last)))
        encode.append(_through(lowest, index + 1, 1 / spacing))
        decode.append(_through(index + 1, lowest, spacing))
        index, last = index + count, highest
    return Code(tuple(decode), tuple(encode), _through(1.0, index + 1, 1 / (1 - last)))


def _through(x: float, y: float, slope: float) -> Line:
    return Line(slope, y - slope * x)


SIGNED = _lines(1)
"""127 magnitudes of either sign; byte = 127 + index, or 127 - index. 1 has no negative twin."""
UNSIGNED = _lines(2)
"""254 magnitudes and 1; byte = index."""

ZERO_CODE = {True: 127, False: 0}
"""The byte of zero, by signed."""


@cache
def table(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """Give the 256 values of a code, increasing, float32.

    Source: bitsandbytes functional.create_dynamic_map; Dettmers et al. 2022, arXiv:2110.02861.
        Differs: no difference.
    """
    first = 1 if signed else 2
    values = [0.0]
    for decade in range(DECADES):
        count = first * 2**decade
        edges = torch.linspace(0.1, 1, count + 1)
        values += (10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2).tolist()
    values.append(1.0)
    if signed:
        values = [-value for value in values[-2:0:-1]] + values
    return torch.tensor(values, device=device)


class _Tables(NamedTuple):
    known: Tensor
    """The values of the code."""
    middles: Tensor
    """(256,) between each value and the next; infinity after the last."""
    guesses: Tensor
    """int32, by the leading bits of a float: the code of the smallest float that has them. The
    right code is that one or the next: no two middles share their leading bits."""


DROPPED_BITS = 15
"""Of the 32 bits of a float; sign, exponent and 8 of the 23 bits of the mantissa are left."""


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    known = table(signed, device)
    middles = torch.cat([(known[1:] + known[:-1]) / 2, known.new_tensor([torch.inf])])
    count = 2 ** (32 - DROPPED_BITS)
    leading = torch.arange(-count // 2, count // 2, dtype=torch.int32, device=device)
    bits = leading << DROPPED_BITS
    # Among negative floats the smallest is the one with all the dropped bits set.
    smallest = torch.where(leading < 0, bits | (2**DROPPED_BITS - 1), bits).view(torch.float32)
    guesses = torch.bucketize(smallest.nan_to_num(), middles[:-1], out_int32=True)
    return _Tables(known, middles, guesses)


def quantize(values: Tensor, signed: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode blocks: the reference, by looking up.

    Args:
        values: (blocks, BLOCK) float32, finite.
        signed: Which table; the unsigned one takes no negative values.
        noise: (blocks, BLOCK) uniform in [0, 1) for stochastic rounding; None: to nearest.

    Returns:
        Codes (blocks, BLOCK) uint8 and the scale of every block, (blocks, 1) float32. A block of
        zeros has scale 0.
    """
    scale = values.abs().amax(-1, keepdim=True)
    scaled = values / torch.where(scale > 0, scale, 1)
    known, middles, guesses = _tables(signed, values.device)
    leading = (scaled.view(torch.int32) >> DROPPED_BITS) + len(guesses) // 2
    codes = guesses[leading]
    codes += scaled > middles[codes]
    if noise is None:
        return codes.to(torch.uint8), scale
    low = (codes - (scaled < known[codes]).int()).clamp_(0, 254)
    fraction = (scaled - known[low]) / (known[low + 1] - known[low])
    # The magnitude is rounded, so that the noise means the same to `quantize_by_lines`.
    up = torch.where(scaled < 0, noise < fraction, noise >= 1 - fraction)
    return (low + up).to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Decode blocks: the reference, by looking up.

    Args:
        codes: (blocks, BLOCK) uint8.
        scale: (blocks, 1) float32.

    Returns:
        (blocks, BLOCK) float32.
    """
    return table(signed, codes.device)[codes.int()] * scale


def quantize_by_lines(
    values: Tensor, signed: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode like `quantize`, by arithmetic: for torch.compile, which vectorizes it.

    A value within float32 rounding of the middle between two codes may go to the other one.
    """
    code = SIGNED if signed else UNSIGNED
    scale = values.abs().amax(-1, keepdim=True)
    # The smallest normal number: the reciprocal of a smaller one may be infinite.
    scaled = values * (1 / scale.clamp(min=torch.finfo(torch.float32).tiny))
    magnitude = scaled.abs()
    index = _on(code.encode[-1], magnitude)
    # Sums of hinges, because relu is one instruction and minimum, which passes NaN on, is four.
    # From the last line down: there every summand is of the size of the result, or zero.
    for hinge in _hinges(code.encode):
        index = index - torch.relu(_on(hinge, magnitude))
    if signed:  # the negative side ends before 1
        index = index - torch.relu(index - 127)
    index = index + torch.relu(_on(code.top, scaled) - index)
    index = torch.floor(index + (0.5 if noise is None else noise))
    if noise is not None:  # the sum may be rounded up to the next whole number
        index = index - torch.relu(index - (128 if signed else 255))
    if not signed:
        return index.to(torch.uint8), scale
    return torch.where(scaled < 0, 127 - index, 127 + index).to(torch.uint8), scale


def dequantize_by_lines(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Decode like `dequantize`, by arithmetic, to float32 rounding."""
    code = SIGNED if signed else UNSIGNED
    index = codes.float()
    if signed:
        index = index - 127
    magnitude = index.abs()
    value = torch.relu(_on(code.decode[0], magnitude))
    for hinge in _hinges(code.decode):
        value = value + torch.relu(_on(hinge, magnitude))
    value = value - torch.relu(value - 1)
    if signed:
        value = torch.where(index < 0, -value, value)
    return value * scale


def _hinges(lines: tuple[Line, ...]) -> Iterator[Line]:
    """Give what each line adds to the one before, where they are sorted by index."""
    for before, line in pairwise(lines):
        yield Line(line.slope - before.slope, line.offset - before.offset)


def _on(line: Line, x: Tensor) -> Tensor:
    return x * line.slope + line.offset
