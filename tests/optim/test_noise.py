"""The numbers of stochastic rounding: uniform, uncorrelated, and the same everywhere."""

import math

import pytest
import torch

from unlearn_llm.optim.noise import GOLDEN, Noise, counters, noise, noise_key

ENTRIES = 2**16
CPU = torch.device("cpu")


def draw(ordinal=3, step=7, start=0, stop=ENTRIES):
    return noise(counters(noise_key(ordinal, step), start, stop, CPU))


def lowbias32(x):
    """C. Wellons' hash on unsigned numbers, as published."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_numbers_are_those_of_the_published_hash():
    golden = 0x9E3779B1
    key = noise_key(3, 7) % 2**32
    drawn = torch.stack(draw())
    for entry in (0, 1, 2, 255, 256, 40_000, ENTRIES - 1):
        first = lowbias32((entry * golden + key) % 2**32)
        second = lowbias32((first + golden) % 2**32)
        halves = [first % 2**16, first >> 16, second % 2**16, second >> 16]
        expected = torch.tensor([(half + 0.5) / 2**16 for half in halves])
        assert torch.equal(drawn[:, entry], expected)


@pytest.mark.parametrize("stream", Noise._fields)
def test_numbers_are_uniform(stream):
    numbers = getattr(draw(), stream).double()
    assert numbers.min() > 0
    assert numbers.max() < 1
    # Four standard errors each: those of a mean, of a variance, and of a chi-square.
    assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12 / ENTRIES)
    assert abs(numbers.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / ENTRIES)
    for bins in (numbers * 256, numbers * 65536 % 256):  # of the high bits and of the low ones
        counts = bins.long().bincount(minlength=256).double()
        expected = ENTRIES / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


def correlation(one, other):
    return torch.corrcoef(torch.stack([one, other]).double())[0, 1].item()


PAIRS = {
    "two streams": [(one, other) for one in range(4) for other in range(one)],
    "neighbouring entries": [(stream, stream) for stream in range(4)],
    "neighbouring parameters": [(one, other) for one in range(4) for other in range(4)],
    "neighbouring steps": [(one, other) for one in range(4) for other in range(4)],
    "rows of a block apart": [(stream, stream) for stream in range(4)],
}


@pytest.mark.parametrize("claim", PAIRS)
def test_numbers_are_uncorrelated(claim):
    first = draw()
    second = {
        "two streams": first,
        "neighbouring entries": [stream.roll(1) for stream in first],
        "neighbouring parameters": draw(ordinal=4),
        "neighbouring steps": draw(step=8),
        "rows of a block apart": [stream.roll(256) for stream in first],
    }[claim]
    for one, other in PAIRS[claim]:
        # Standard error 1 / sqrt(n); of up to sixteen pairs.
        assert abs(correlation(first[one], second[other])) < 4 / math.sqrt(ENTRIES)


def test_the_mean_over_steps_of_an_entry_is_a_half():
    # What keeps a slow average unbiased: one entry, over time.
    steps = 2000
    drawn = torch.stack([torch.stack(draw(step=step, stop=8)) for step in range(1, steps + 1)])
    error = (drawn.double().mean(0) - 0.5).abs()
    assert error.max() < 4 * math.sqrt(1 / 12 / steps)
    for stream in range(4):
        series = drawn[:, stream, 0]
        assert abs(correlation(series[1:], series[:-1])) < 4 / math.sqrt(steps)


def test_equal_arguments_draw_equal_numbers_whatever_the_global_seed():
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, draw(), strict=True))


@pytest.mark.parametrize("start", [0, 1, 256, 65_535])
def test_a_part_draws_what_it_draws_in_the_whole(start):
    whole = torch.stack(draw())
    part = torch.stack(draw(start=start))
    assert torch.equal(part, whole[:, start:])


@pytest.mark.parametrize("first", [0, 1, 256, 12_345, 2**31 + 5, 2**33 + 1])
def test_a_key_may_begin_at_any_entry(first):
    # As a shard does, whose own entries are numbered from zero.
    key = noise_key(3, 7, first)
    assert -(2**31) <= key < 2**31
    expected = [lowbias32(((first + i) * GOLDEN + noise_key(3, 7)) % 2**32) % 2**16 for i in (0, 9)]
    drawn = noise(counters(key, 0, 10, CPU)).mean[[0, 9]]
    assert torch.equal(drawn, (torch.tensor(expected) + 0.5) / 2**16)


def test_keys_are_32_bits_and_differ():
    keys = {noise_key(ordinal, step) for ordinal in range(300) for step in range(1, 301)}
    assert all(-(2**31) <= key < 2**31 for key in keys)
    # 90000 keys of 2^32: one pair in common expected by chance.
    assert len(keys) >= 90_000 - 6
