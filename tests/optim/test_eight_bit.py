"""DualAdamW and DualAdamWPlus with moments in 8 bits: what is kept, and what a step does."""

import math

import pytest
import torch
from dual_runs import CLASSES, ONE_TO_FIVE, random_grads, train

from unlearn_llm.optim import DualAdamW, DualAdamWPlus
from unlearn_llm.optim.codec import BLOCK, dequantize, quantize
from unlearn_llm.optim.noise import counters, noise, noise_key
from unlearn_llm.optim.update import Moments, coefficients, dual_plus_update, dual_update

EIGHT = {"state_bits": 8, "min_8bit_size": 1}
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
BOTH = pytest.mark.parametrize("optimizer_class", CLASSES)


def make(optimizer_class, shape=(1000,), dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    return optimizer_class([param], **{"lr": 1e-2, **EIGHT, **options}), param


def moments_of(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def codes_in(state):
    """The moments kept in codes."""
    return {name for name, value in moments_of(state).items() if value.dtype == torch.uint8}


DELTAS = {"forget_mean", "forget_square", "retain_mean", "retain_square"}
BASE = {"base_mean", "base_square"}


@pytest.mark.parametrize(
    ("optimizer_class", "options", "expected"),
    [
        (DualAdamW, {}, DELTAS),
        (DualAdamW, {"state_bits": 32}, set()),
        (DualAdamWPlus, {}, DELTAS | BASE),
        (DualAdamWPlus, {"quantize": "all"}, DELTAS | BASE),
        (DualAdamWPlus, {"quantize": "base"}, BASE),
        (DualAdamWPlus, {"quantize": "delta"}, DELTAS),
        (DualAdamWPlus, {"quantize": "base", "state_bits": 32}, set()),
        (DualAdamWPlus, {"min_8bit_size": 1001}, set()),
        (DualAdamWPlus, {"min_8bit_size": 1000}, DELTAS | BASE),
        (DualAdamWPlus, {"dtype": torch.float64}, set()),
        (DualAdamWPlus, {"dtype": torch.bfloat16}, DELTAS | BASE),
    ],
)
def test_the_options_say_which_moments_are_codes(optimizer_class, options, expected):
    optimizer, param = make(optimizer_class, **options)
    train(optimizer, [param], ["forget"], random_grads(1, (1000,)))
    state = optimizer.state[param]
    assert codes_in(state) == expected
    scales = {name.removesuffix("_scale") for name in state if name.endswith("_scale")}
    assert scales == expected
    for name in DELTAS | (BASE & state.keys()):
        assert state[name].shape == param.shape
        if name in expected:
            assert state[name + "_scale"].shape == (math.ceil(1000 / BLOCK),)
        else:
            assert state[name].dtype == torch.promote_types(param.dtype, torch.float32)


def test_small_parameters_keep_float32_by_default():
    params = [torch.nn.Parameter(torch.ones(size)) for size in (4095, 4096)]
    optimizer = DualAdamW(params, state_bits=8)
    train(optimizer, params[:1], ["forget"], [torch.ones(4095)])
    train(optimizer, params[1:], ["forget"], [torch.ones(4096)])
    assert [bool(codes_in(optimizer.state[param])) for param in params] == [False, True]


def test_a_group_may_have_a_width_of_its_own():
    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    groups = [{"params": params[:1], "state_bits": 32}, {"params": params[1:]}]
    optimizer = DualAdamWPlus(groups, **EIGHT)
    train(optimizer, params, ["forget"], [torch.ones(300)])
    assert [bool(codes_in(optimizer.state[param])) for param in params] == [False, True]


@pytest.mark.parametrize(
    ("optimizer_class", "moments"), [(DualAdamW, 4), (DualAdamWPlus, 6)], ids=["dual", "plus"]
)
def test_a_moment_takes_a_byte_and_a_256th_of_a_float_per_entry(optimizer_class, moments):
    optimizer, param = make(optimizer_class, (64, 512))
    train(optimizer, [param], ["forget"], random_grads(1, (64, 512)))
    sizes = [x.numel() * x.element_size() for x in moments_of(optimizer.state[param]).values()]
    # methods.md 3.4: 4.06 and 6.09.
    assert sum(sizes) / param.numel() == moments * (1 + 4 / 256)


def blocks(flat):
    padded = torch.zeros(math.ceil(len(flat) / BLOCK) * BLOCK, dtype=flat.dtype)
    padded[: len(flat)] = flat
    return padded.view(-1, BLOCK)


def opened(state, owner, signed_square):
    """Decode the two moments of a role or of the base."""
    both = []
    for moment, signed in (("mean", True), ("square", signed_square)):
        codes, scale = state[f"{owner}_{moment}"], state[f"{owner}_{moment}_scale"]
        values = dequantize(blocks(codes.flatten()), scale.view(-1, 1), signed)
        both.append(values.flatten()[: codes.numel()])
    return Moments(*both)


def closed(moments, signed_square, draws):
    """Encode two moments: codes and scales."""
    encoded = []
    for values, signed, draw in zip(moments, (True, signed_square), draws, strict=True):
        codes, scale = quantize(blocks(values), signed, None if draw is None else blocks(draw))
        encoded += [codes.flatten()[: len(values)], scale.flatten()]
    return encoded


SPREAD = 10 ** torch.linspace(-3, 1, 700)


def spread_grads(steps):
    return [grad * SPREAD for grad in random_grads(steps, (700,), dtype=torch.float32)]


@ROUNDINGS
@BOTH
def test_a_step_decodes_updates_and_encodes(optimizer_class, rounding):
    plus = optimizer_class is DualAdamWPlus
    options = {"rounding": rounding, "weight_decay": 0.1, "forget_lr_scale": 2.0}
    optimizer, param = make(optimizer_class, (700,), **options)
    roles, grads = [*ONE_TO_FIVE, "forget"], spread_grads(7)
    train(optimizer, [param], roles[:6], grads[:6])
    state = optimizer.state[param]
    moments = opened(state, "forget", signed_square=plus)
    base = opened(state, "base", signed_square=False) if plus else None
    idle = {name: x.clone() for name, x in moments_of(state).items() if "retain" in name}
    expected = param.detach().clone()
    c = coefficients(
        lr=2e-2,
        weight_decay=0.1,
        eps=1e-8,
        betas=(0.9, 0.95),
        role_step=2,
        base_betas=(0.9, 0.95),
        total_step=7,
    )
    if plus:
        dual_plus_update(expected, grads[6], base, moments, c)
    else:
        dual_update(expected, grads[6], moments, c)

    train(optimizer, [param], roles[6:], grads[6:])
    assert torch.equal(param, expected)
    draws = [None] * 4
    if rounding == "stochastic":
        draws = noise(counters(noise_key(0, 7), 0, 700, torch.device("cpu")))
    both = [("forget", moments, plus, draws[:2]), ("base", base, False, draws[2:])]
    for owner, pair, signed_square, drawn in both[: 1 + plus]:
        names = [f"{owner}_{name}" for name in ("mean", "mean_scale", "square", "square_scale")]
        encoded = closed(pair, signed_square, drawn)
        for name, value in zip(names, encoded, strict=True):
            assert torch.equal(state[name], value), name
    for name, value in idle.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("optimizer_class", "options", "bound"),
    [
        # Measured 2.5, 3.6, 2.5, 6.6, 4.2, 5.8 and 8.1 %. A code is off by up to 6 % of its
        # number, of which averages keep less; DualOptim+ takes the root of a difference of two.
        (DualAdamW, {}, 0.04),
        (DualAdamW, {"rounding": "stochastic"}, 0.06),
        (DualAdamWPlus, {"max_update": 1.0}, 0.04),
        (DualAdamWPlus, {"max_update": 10.0}, 0.1),
        (DualAdamWPlus, {"max_update": 10.0, "quantize": "base"}, 0.07),
        (DualAdamWPlus, {"max_update": 10.0, "quantize": "delta"}, 0.1),
        (DualAdamWPlus, {"max_update": 10.0, "rounding": "stochastic"}, 0.12),
    ],
)
def test_twenty_steps_stay_near_those_in_32_bits(optimizer_class, options, bound):
    size = 100 * BLOCK
    roles = (ONE_TO_FIVE * 4)[:20]
    mean_of = dict(zip(("forget", "retain"), random_grads(2, (size,), seed=3), strict=True))
    sizes = 10 ** (-2 * torch.rand(size, generator=torch.Generator().manual_seed(4)))
    grads = [
        sizes * (mean_of[role] + noise)
        for role, noise in zip(roles, random_grads(20, (size,)), strict=True)
    ]
    moved = []
    for bits in (32, 8):
        settings = {"lr": 1e-3, "weight_decay": 0.0, **options, "state_bits": bits}
        optimizer, param = make(optimizer_class, (size,), **settings)
        start = param.detach().clone()
        train(optimizer, [param], roles, grads)
        moved.append(param.detach() - start)
    difference = (moved[1] - moved[0]).abs().mean() / moved[0].abs().mean()
    assert 1e-3 < difference < bound


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_dual_adamw_with_one_role_is_bitsandbytes_adamw(role):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    size = 64 * BLOCK
    ours, param = make(DualAdamW, (size,), lr=1e-3, weight_decay=0.0)
    twin = torch.nn.Parameter(param.detach().clone())
    theirs = bitsandbytes.optim.AdamW8bit(
        [twin], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    start = param.detach().clone()
    for grad in random_grads(5, (size,), dtype=torch.float32):
        # No small ones: its CPU kernel looks them up in a coarse table.
        grad = grad.sign() * (0.3 + 0.7 * grad.abs().clamp(max=1))
        train(ours, [param], [role], [grad])
        twin.grad = grad.clone()
        theirs.step()
    state, other = ours.state[param], theirs.state[twin]
    for name, codes, scale in ((f"{role}_mean", "state1", "absmax1"),
                               (f"{role}_square", "state2", "absmax2")):  # fmt: skip
        assert (state[name] == other[codes]).float().mean() >= 0.99
        # One code aside may be the largest of its block: 0.7 % of it.
        torch.testing.assert_close(state[name + "_scale"], other[scale], rtol=1e-2, atol=0)
    assert (param - twin).abs().mean() < 1e-3 * (twin - start).abs().mean()


# Refusals.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("named", [True, False])
@BOTH
def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves(
    optimizer_class, named, value
):
    params = {name: torch.nn.Parameter(torch.ones(300)) for name in ("first", "second")}
    optimizer = optimizer_class(params.items() if named else params.values(), **EIGHT)
    for param in params.values():
        param.grad = torch.ones(300)
    params["second"].grad[7] = value
    message = r"of 'second' \(300,\)" if named else r"of parameter 1 of shape \(300,\)"
    with pytest.raises(RuntimeError, match=message + " is not finite, and 8-bit"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(300)) for param in params.values())
    assert not optimizer.state


def test_a_second_group_is_looked_at_before_the_first_moves():
    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = DualAdamW([{"params": [param]} for param in params], **EIGHT)
    params[0].grad, params[1].grad = torch.ones(300), torch.full((300,), math.nan)
    with pytest.raises(RuntimeError, match="parameter 0 of shape"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(300))


@ROUNDINGS
@BOTH
def test_the_look_at_gradients_can_be_switched_off(optimizer_class, rounding):
    optimizer, param = make(optimizer_class, rounding=rounding, refuse_nonfinite=False)
    grad = torch.ones(1000)
    grad[3] = math.nan
    train(optimizer, [param], ["forget"], [grad])
    # The entry's block is spoilt, the others are not.
    assert param[256:].isfinite().all()
    assert not optimizer.state[param]["forget_mean_scale"][0].isfinite()
    assert optimizer.state[param]["forget_mean_scale"][1:].isfinite().all()


def test_32_bit_moments_take_any_gradient():
    optimizer, param = make(DualAdamW, state_bits=32)
    train(optimizer, [param], ["forget"], [torch.full((1000,), math.inf)])
    assert param.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 4}, "state_bits: expected 32 or 8, got 4"),
        ({"rounding": "up"}, "rounding: expected 'nearest' or 'stochastic', got 'up'"),
        ({"quantize": "both"}, "quantize: expected 'all' or 'base' or 'delta', got 'both'"),
        ({"min_8bit_size": -1}, "min_8bit_size: expected a finite number of at least 0, got -1"),
        ({"max_update": 0.0}, "max_update: expected a number above 0, or None, got 0.0"),
        ({"max_update": -1.0}, "max_update: .* got -1.0"),
        ({"max_update": math.nan}, "max_update: .* got nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DualAdamWPlus([torch.nn.Parameter(torch.ones(1))], **options)


# Rounding.


@BOTH
def test_stochastic_rounding_is_the_same_in_every_run_and_not_nearest(optimizer_class):
    ends = []
    for rounding in ("stochastic", "stochastic", "nearest"):
        torch.manual_seed(len(ends))
        optimizer, param = make(optimizer_class, rounding=rounding)
        train(optimizer, [param], ONE_TO_FIVE, random_grads(6, (1000,)))
        ends.append(param.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_stochastic_rounding_keeps_what_nearest_loses():
    # Means that fall by 0.1 % per step, where codes are a percent or more apart.
    first, steady = torch.ones(100 * BLOCK), torch.zeros(100 * BLOCK)
    first[::BLOCK] = steady[::BLOCK] = 100.0  # so that a block's scale is another entry's
    left = {}
    for rounding in ("nearest", "stochastic"):
        optimizer, param = make(DualAdamW, (100 * BLOCK,), rounding=rounding, betas=(0.999, 0.999))
        train(optimizer, [param], ["retain"] * 301, [first, *[steady] * 300])
        mean = opened(optimizer.state[param], "retain", signed_square=False).mean
        left[rounding] = mean.view(-1, BLOCK)[:, 1:].mean()
    exact = 1e-3 * 0.999**300
    assert abs(left["nearest"] / exact - 1) > 0.2
    assert left["stochastic"] == pytest.approx(exact, rel=0.05)
