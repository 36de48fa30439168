"""Reproducible random numbers for stochastic rounding: a hash of the entry, not a generator.

No state to save, the same numbers in every kernel, and a resumed run draws what the uninterrupted
one would have drawn.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """Uniform in (0, 1), 65536 values, for the four numbers that one step stores per entry."""

    mean: Tensor
    square: Tensor
    base_mean: Tensor
    base_square: Tensor


def noise(counter: Tensor) -> Noise:
    """Draw for entries of one parameter.

    Args:
        counter: int32, a number of each entry; see `counters`.
    """
    first = _hash(counter)
    second = _hash(first + GOLDEN)
    return Noise(_low(first), _high(first), _low(second), _high(second))


def counters(key: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Number the entries from `start` to `stop` of one parameter in one step, int32."""
    return torch.arange(start, stop, dtype=torch.int32, device=device) * GOLDEN + key


def noise_key(ordinal: int, step: int, first: int = 0) -> int:
    """Make the key of one parameter and step, a signed 32-bit number.

    Args:
        ordinal: Place of the parameter in the optimiser.
        step: Steps of both roles, counting this one.
        first: Number of the entry that counts as the first: a shard draws what its entries draw
            in the whole parameter.
    """
    mixed = (step * 0x9E3779B97F4A7C15 + ordinal * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & (2**64 - 1)
    return _signed(((mixed >> 32) + first * GOLDEN) % 2**32)


def _signed(value: int) -> int:
    """Read 32 bits as the int32 that torch multiplies, which wraps like an unsigned one."""
    return value - 2**32 if value >= 2**31 else value


GOLDEN = _signed(0x9E3779B1)
HASH_FACTORS = (_signed(0x7FEB352D), _signed(0x846CA68B))


def _hash(x: Tensor) -> Tensor:
    """Scramble 32 bits.

    Source: C. Wellons, "Prospecting for hash functions", 2018, lowbias32. Differs: no difference.
    """
    x = _shifted(x, 16) * HASH_FACTORS[0]
    x = _shifted(x, 15) * HASH_FACTORS[1]
    return _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # int32 shifts copies of the sign in: mask them, as an unsigned shift would.
    mask = (1 << (32 - bits)) - 1
    return x ^ ((x >> bits) & mask)


def _low(x: Tensor) -> Tensor:
    return ((x & 0xFFFF).to(torch.float32) + 0.5) / 65536


def _high(x: Tensor) -> Tensor:
    return _low(x >> 16)
