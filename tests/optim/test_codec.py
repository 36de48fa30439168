"""The 8-bit code: against bitsandbytes, against a plain search, and against itself."""

import math

import pytest
import torch

from unlearn_llm.optim import codec
from unlearn_llm.optim.codec import (
    BLOCK,
    DROPPED_BITS,
    SIGNED,
    UNSIGNED,
    dequantize,
    dequantize_by_lines,
    quantize,
    quantize_by_lines,
    table,
)

BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
LAST_CODE = 255


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes").functional


def middles(signed):
    """Between neighbouring values of the table; halving and adding float32 twins is exact here."""
    known = table(signed).double()
    return ((known[1:] + known[:-1]) / 2).float()


def searched(values, signed):
    """The codes by a plain search, and the scales."""
    scale = values.abs().amax(-1, keepdim=True)
    scaled = values / torch.where(scale > 0, scale, 1)
    return torch.bucketize(scaled, middles(signed)).to(torch.uint8), scale


def blocks_of(numbers):
    """Blocks whose scale is one, so that the numbers are encoded as they are."""
    rows = list(numbers.split(BLOCK - 1))
    rows[-1] = torch.cat([rows[-1], torch.zeros(BLOCK - 1 - len(rows[-1]))])
    return torch.cat([torch.ones(len(rows), 1), torch.stack(rows)], 1)


def random_blocks(signed, rows=2000):
    """Blocks of many scales, whose entries spread over the decades of the code."""
    values = torch.randn(rows, BLOCK) * 10 ** (-8 * torch.rand(rows, BLOCK) ** 2)
    values *= 10 ** (20 * torch.rand(rows, 1) - 15)
    return values if signed else values.abs()


def adversarial(signed):
    """Where a fast search would err: borders, their neighbours, values of the table, zeros."""
    denormals = torch.tensor([1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38])
    numbers = [table(signed), torch.tensor([0.0, 1.0]), denormals]
    for center in (middles(signed), table(signed)):
        numbers += [torch.nextafter(center, torch.tensor(to)) for to in (-math.inf, math.inf)]
    numbers += [middles(signed)]
    flat = torch.cat([*numbers, torch.tensor([-0.0])]) if signed else torch.cat(numbers)
    flat = torch.cat([flat, -flat]) if signed else flat[flat >= 0]
    return blocks_of(flat.clamp(-1, 1))


@BOTH
def test_the_table_is_that_of_bitsandbytes(bitsandbytes, signed):
    assert torch.equal(table(signed), bitsandbytes.create_dynamic_map(signed=signed))


@BOTH
@pytest.mark.parametrize("make", [adversarial, random_blocks])
def test_codes_are_those_of_a_plain_search(make, signed):
    values = make(signed)
    codes, scale = quantize(values, signed)
    expected, expected_scale = searched(values, signed)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)
    assert codes.dtype == torch.uint8
    assert (len(codes.unique()) == 256) or (make is random_blocks)


@BOTH
def test_a_code_is_one_of_the_nearest_values(signed):
    values = random_blocks(signed)
    codes, scale = quantize(values, signed)
    scaled = (values / scale).double()[..., None]
    for rows, chosen in zip(scaled[:300].split(100), codes[:300].split(100), strict=True):
        distance = (rows - table(signed).double()).abs()
        at_choice = distance.gather(-1, chosen.long()[..., None])
        # Middles are float32: half an ulp of the larger value.
        assert (at_choice - distance.amin(-1, keepdim=True) <= 2.0**-24 * rows.abs()).all()


@BOTH
@pytest.mark.usefixtures("bitsandbytes")
def test_bytes_are_those_of_bitsandbytes(signed):
    values = torch.cat([random_blocks(signed, rows=200), adversarial(signed)])
    # Float64, because its kernel for float32 on CPUs looks up in a table that is coarse near zero
    # (0.50: code 131 for 0); for other types it searches the smallest distance.
    theirs, their_scale = torch.ops.bitsandbytes.quantize_blockwise(
        values.double(), table(signed), BLOCK
    )
    codes, scale = quantize(values, signed)
    assert torch.equal(scale.flatten(), their_scale)
    different = codes != theirs
    assert different[:200].sum() <= 2  # of 51200
    # It multiplies by a reciprocal and compares distances: ties may go the other way, no others.
    assert ((codes.int() - theirs.int())[different].abs() == 1).all()
    border = middles(signed)[torch.minimum(codes, theirs)[different].int()]
    assert (((values / scale)[different] - border).abs() <= 2.0**-20 * border.abs()).all()


@BOTH
def test_large_entries_get_the_bytes_of_bitsandbytes_kernel_for_float32(bitsandbytes, signed):
    values = random_blocks(signed)
    theirs, _ = bitsandbytes.quantize_blockwise(
        values.flatten(), code=table(signed), blocksize=BLOCK
    )
    codes, scale = quantize(values, signed)
    large = (values / scale).abs() > 0.1
    difference = (codes.int() - theirs.view_as(codes).int())[large].abs()
    assert difference.float().mean() <= 2e-3  # 2^16 places in its table
    assert difference.max() <= 1


@BOTH
def test_decoding_is_that_of_bitsandbytes(bitsandbytes, signed):
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    scale = 10 ** (20 * torch.rand(40, 1) - 15)
    theirs = bitsandbytes.dequantize_blockwise(
        codes.flatten(), absmax=scale.flatten(), code=table(signed), blocksize=BLOCK
    )
    assert torch.equal(dequantize(codes, scale, signed).flatten(), theirs)


@BOTH
def test_the_lines_meet_every_value_of_the_table(signed):
    code, known = (SIGNED, table(True)[127:]) if signed else (UNSIGNED, table(False))
    for index, value in enumerate(known.tolist()):
        decoded = min(1.0, max(0.0, *(slope * index + offset for slope, offset in code.decode)))
        assert decoded == pytest.approx(value, rel=1e-6, abs=0)
        encoded = min(slope * value + offset for slope, offset in code.encode)
        encoded = max(encoded, code.top.slope * value + code.top.offset)
        # The table is float32: an ulp of a value is at most 3e-5 steps between values.
        assert encoded == pytest.approx(index, abs=1e-4)


@BOTH
@pytest.mark.parametrize("make", [adversarial, random_blocks])
def test_computed_codes_are_those_looked_up_except_at_ties(make, signed):
    values = make(signed)
    codes, scale = quantize(values, signed)
    computed, computed_scale = quantize_by_lines(values, signed)
    assert torch.equal(computed_scale, scale)
    different = codes != computed
    if make is random_blocks:
        assert different.float().mean() <= 1e-4
    lower = torch.minimum(codes, computed)[different].int()
    assert torch.equal(torch.maximum(codes, computed)[different].int(), lower + 1)
    step = (table(signed)[lower + 1] - table(signed)[lower]).abs()
    # The index is a float32 up to 255: 2^-16 of a step for each of a few roundings.
    off = (values / scale)[different] - middles(signed)[lower]
    assert (off.abs() <= 2.0**-13 * step).all()


@BOTH
def test_computed_values_are_those_looked_up(signed):
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    scale = 10 ** (20 * torch.rand(40, 1) - 15)
    torch.testing.assert_close(
        dequantize_by_lines(codes, scale, signed),
        dequantize(codes, scale, signed),
        rtol=8 * 2.0**-23,
        atol=0,
    )


@BOTH
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
def test_encoding_again_changes_nothing(encode, signed):
    values = random_blocks(signed)
    values[:, 0] = values.abs().amax(-1)  # positive: the table has 1 and no -1
    decoded = dequantize(*quantize(values, signed), signed)
    codes, scale = encode(decoded, signed)
    assert torch.equal(dequantize(codes, scale, signed), decoded)


@BOTH
@pytest.mark.parametrize("decode", [dequantize, dequantize_by_lines])
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
@pytest.mark.parametrize("draw", [None, 2.0**-17, 1 - 2.0**-17])
def test_a_block_of_zeros_stays_zero(encode, decode, signed, draw):
    noise = None if draw is None else torch.full((3, BLOCK), draw)
    codes, scale = encode(torch.zeros(3, BLOCK), signed, noise)
    assert torch.equal(scale, torch.zeros(3, 1))
    assert (codes == codec.ZERO_CODE[signed]).all()
    assert torch.equal(decode(codes, scale, signed), torch.zeros(3, BLOCK))
    any_code = torch.arange(256, dtype=torch.uint8)[None]
    assert not decode(any_code, torch.zeros(1, 1), signed).any()


@BOTH
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
@pytest.mark.parametrize("draw", [2.0**-17, 1 - 2.0**-17])
def test_zeros_and_the_largest_of_a_block_are_never_rounded_away(encode, signed, draw):
    # The ends of the table; a sum of index and noise that is rounded must not leave the byte.
    values = random_blocks(signed)
    values[:, 5] = 0
    at = values.abs().argmax(-1, keepdim=True)
    if signed:
        values.scatter_(1, at, values.gather(1, at).abs())
    codes, _ = encode(values, signed, torch.full_like(values, draw))
    assert (codes[:, 5] == codec.ZERO_CODE[signed]).all()
    largest = codes.gather(1, at)
    assert (largest >= LAST_CODE - (encode is quantize_by_lines and draw < 0.5)).all()


@BOTH
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
def test_blocks_of_denormal_numbers_keep_their_size_and_sign(encode, signed):
    values = torch.full((1, BLOCK), 1e-40)
    values[0, ::2] *= -1 if signed else 0.5
    values[0, 7] = 0
    decoded = dequantize(*encode(values, signed), signed)
    assert decoded.abs().max() <= values.abs().max()
    assert not (decoded * values < 0).any()
    assert decoded[0, 7] == 0


def neighbours(values, scale, signed):
    """The codes below and above."""
    scaled = (values / scale).double()
    known = table(signed).double()
    above = torch.searchsorted(known, scaled).clamp(1, LAST_CODE)
    return above - 1, above


@BOTH
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
def test_stochastic_rounding_gives_a_neighbour(encode, signed):
    values = random_blocks(signed)
    codes, scale = encode(values, signed, torch.rand_like(values))
    below, above = neighbours(values, scale, signed)
    strange = (codes != below) & (codes != above)
    if encode is quantize:
        assert not strange.any()
    # A number within float32 rounding of a value of the table may count as being beyond it.
    assert strange.float().mean() <= 1e-4
    assert ((codes - below)[strange].abs() <= 2).all()
    assert {0, 1} <= set((codes - below).unique().tolist())


@BOTH
@pytest.mark.parametrize("encode", [quantize, quantize_by_lines])
def test_stochastic_rounding_is_unbiased(encode, signed):
    draws = 4000
    numbers = torch.rand(BLOCK) ** 6
    numbers[0] = 1  # the scale
    if signed:
        numbers[1::2] *= -1
    values = numbers.repeat(draws, 1)
    noise = (torch.randint(2**16, values.shape) + 0.5) / 2**16
    decoded = dequantize(*encode(values, signed, noise), signed).double()
    below, above = neighbours(numbers, 1.0, signed)
    known = table(signed).double()
    low, high = known[below], known[above]
    exact = numbers.double().clamp(known[0], known[-1])
    deviation = ((exact - low) * (high - exact)).clamp_min(0).sqrt()
    error = decoded.mean(0) - exact
    # Noise of 16 bits and a computed index of 16 fractional bits: a few 2^-16 of the spacing.
    bound = 4.5 * deviation / draws**0.5 + 2.0**-13 * (high - low)
    assert (error.abs() <= bound).all()  # 4.5: of 256 numbers; chance 2e-3
    pooled = error.sum() / deviation.square().sum().sqrt() * draws**0.5
    assert abs(pooled) <= 4
    nearest = dequantize(*encode(values[:1], signed), signed).double()[0] - exact
    assert (nearest.abs() > bound).sum() > 150  # the bound can tell


@BOTH
def test_computed_stochastic_codes_are_those_looked_up(signed):
    values = random_blocks(signed)
    noise = (torch.randint(2**16, values.shape) + 0.5) / 2**16
    codes, _ = quantize(values, signed, noise)
    computed, _ = quantize_by_lines(values, signed, noise)
    assert (codes != computed).float().mean() <= 1e-3
    assert (codes.int() - computed.int()).abs().max() <= 1


@BOTH
def test_no_two_middles_share_the_leading_bits_of_a_guess(signed):
    leading = middles(signed).view(torch.int32) >> DROPPED_BITS
    assert len(leading.unique()) == LAST_CODE


def test_numbers_that_are_not_finite_give_codes_all_the_same():
    values = torch.full((3, BLOCK), math.nan)
    values[1] = math.inf
    values[2, 3:] = 1.0
    for noise in (None, torch.rand(3, BLOCK)):
        codes, scale = quantize(values, True, noise)
        assert codes.shape == (3, BLOCK)
        assert not scale.isfinite().any()
