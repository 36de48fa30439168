"""The 8-bit code and its noise in registers: parts of the Triton kernel of `triton_step`.

Decoding looks up. Encoding computes, because a search would cost more than the rest of the step:
the decade of a magnitude comes from its logarithm, and says which of the code's straight lines
are near. The numbers are those of `codec` and `noise`.
"""

# The values of a kernel have types of Triton's own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import math
from typing import NamedTuple

import triton
import triton.language as tl

from unlearn_llm.optim import codec, noise
from unlearn_llm.optim.codec import DECADES, Code, Line


class Family(NamedTuple):
    """The same line in every decade: slope / 5^decade * x + growth * 2^decade + shift."""

    slope: float
    growth: float
    shift: float


class Form(NamedTuple):
    """The encoding lines of one code by decade, for magnitudes from 0 to UNIT."""

    inner: Family
    """Between the values of the decade."""
    below: Family
    """Between the decade before and this one."""
    above: Family
    """Between this decade and the next one."""
    bottom: float
    """Slope of the line between zero and the smallest value, where there is no decade before."""
    top: Line
    """Between the last value of the last decade and 1."""
    last: float
    """Index of the last value before 1."""


UNIT = tl.constexpr(10 ** (DECADES - 0.5))
"""What the largest magnitude of a block is scaled to: rounding the decimal logarithm of a scaled
magnitude gives its decade."""


def _form(code: Code) -> Form:
    def family(ones: Line, twos: Line) -> Family:
        """Read a family from its lines in the decades 1 and 2."""
        growth = (twos.offset - ones.offset) / 2
        return Family(ones.slope * 5 / UNIT.value, growth, ones.offset - 2 * growth)

    lines, top = code.encode, code.top
    return Form(
        family(lines[3], lines[5]),
        family(lines[2], lines[4]),
        family(lines[4], lines[6]),
        lines[0].slope / UNIT.value,
        Line(top.slope / UNIT.value, top.offset),
        round(top.slope + top.offset) - 1.0,
    )


SIGNED = tl.constexpr(_form(codec.SIGNED))
UNSIGNED = tl.constexpr(_form(codec.UNSIGNED))

SHRINK = tl.constexpr(1 - 2**-21)
"""Keeps a division's rounding, and the noise on it, from passing the last code of a byte."""
SMALLEST = tl.constexpr(2.0**-100)
"""Its reciprocal times UNIT is a float32; a block of smaller numbers gets codes too small."""
LOG_2 = tl.constexpr(math.log10(2))
MINUS_LOG_5 = tl.constexpr(-math.log2(5))
WHOLE = tl.constexpr(2.0**23)
"""From here on float32 has whole numbers only, and shows them in its low bits."""
ONE_BITS = tl.constexpr(0x3F800000)
SIGN_BIT = tl.constexpr(0x80000000)
ZERO = tl.constexpr(codec.ZERO_CODE[True])
"""The signed code's byte for zero."""

GOLDEN = tl.constexpr(noise.GOLDEN % 2**32)
FACTORS = tl.constexpr(tuple(factor % 2**32 for factor in noise.HASH_FACTORS))


@triton.jit
def encode(
    values,
    scale,
    SIGNED_CODE: tl.constexpr,
    noise,
    STOCHASTIC: tl.constexpr,
    PTX: tl.constexpr,
):
    """Give the codes of float32 numbers.

    Args:
        values: Any shape.
        scale: The largest magnitude, of a shape that broadcasts.
        noise: Uniform in (1, 2), see `draw`, for stochastic rounding.
        PTX: Whether instructions of NVIDIA's may be used.
    """
    form: tl.constexpr = SIGNED if SIGNED_CODE else UNSIGNED
    scaled = values * (UNIT * SHRINK / tl.maximum(scale, SMALLEST))
    magnitude = tl.abs(scaled)
    # A whole number in the low bits; numbers below 1 belong to the lowest decade, too.
    decade = _log2(tl.maximum(magnitude, 1.0), PTX) * LOG_2 + WHOLE
    doubled = ((decade.to(tl.int32, bitcast=True) << 23) + ONE_BITS).to(tl.float32, bitcast=True)
    reduced = magnitude * _exp2((decade - WHOLE) * MINUS_LOG_5, PTX)
    index = tl.minimum(_on(form, 0, reduced, doubled), _on(form, 1, reduced, doubled))
    if STOCHASTIC:  # to nearest, the line of the decade leads to the same codes
        index = tl.minimum(index, _on(form, 2, reduced, doubled))
    if SIGNED_CODE:  # the negative side ends before 1, and its next byte would be the largest
        index = tl.minimum(index, form[5])
    index = tl.maximum(index, _up_to_1(magnitude * form[3], PTX))
    top: tl.constexpr = form[4]
    index = tl.maximum(index, scaled * top[0] + top[1])
    if STOCHASTIC:
        index += noise - 1.5
    if SIGNED_CODE:
        sign = values.to(tl.uint32, bitcast=True) & SIGN_BIT
        index = (index.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    # Rounds to even, where the reference rounds up: exact middles are as good on either side. The
    # 256 is not in the byte; it keeps sums away from numbers below WHOLE, which have halves.
    shown = index + (WHOLE + 256 + ZERO if SIGNED_CODE else WHOLE + 256)
    return shown.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _on(form: tl.constexpr, which: tl.constexpr, reduced, doubled):
    family: tl.constexpr = form[which]
    return reduced * family[0] + (doubled * family[1] + family[2])


@triton.jit
def draw(index, key):
    """Give `noise.noise`, plus one: the four numbers of each entry, in that order."""
    first = _hash(index * GOLDEN + key)
    second = _hash(first + GOLDEN)
    return _low(first), _high(first), _low(second), _high(second)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * FACTORS[0]
    x = (x ^ (x >> 15)) * FACTORS[1]
    return x ^ (x >> 16)


# Sixteen bits and a half, as the mantissa of a number from 1 to 2.
@triton.jit
def _low(x):
    return ((x << 7) & 0x7FFF80 | (ONE_BITS | 0x40)).to(tl.float32, bitcast=True)


@triton.jit
def _high(x):
    return ((x >> 9) & 0x7FFF80 | (ONE_BITS | 0x40)).to(tl.float32, bitcast=True)


# Each of the following is one instruction where PTX says so: exact enough, and without the care for
# denormal numbers that costs up to a dozen.
@triton.jit
def root(x, PTX: tl.constexpr):
    """Give the square root."""
    if PTX:
        return _ptx("sqrt.approx.ftz.f32 $0, $1;", x)
    else:
        return tl.sqrt(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """Give 1 / x."""
    if PTX:
        return _ptx("rcp.approx.ftz.f32 $0, $1;", x)
    else:
        return 1 / x


@triton.jit
def _log2(x, PTX: tl.constexpr):
    if PTX:
        return _ptx("lg2.approx.ftz.f32 $0, $1;", x)
    else:
        return tl.log2(x)


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    if PTX:
        return _ptx("ex2.approx.ftz.f32 $0, $1;", x)
    else:
        return tl.exp2(x)


@triton.jit
def _up_to_1(x, PTX: tl.constexpr):
    if PTX:
        return _ptx("cvt.sat.f32.f32 $0, $1;", x)
    else:
        return tl.minimum(x, 1.0)


@triton.jit
def _ptx(INSTRUCTION: tl.constexpr, x):
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
