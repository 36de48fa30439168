"""The step through torch.compile: the numbers of the eager one, compiled once."""

import functools
import math
import warnings

import pytest
import torch
from dual_runs import ONE_TO_FIVE

from unlearn_llm.optim import DualAdamW, DualAdamWPlus, chunked, set_role
from unlearn_llm.optim.codec import BLOCK

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
# A chunk and a bit, two that are joined, one of whole chunks.
SHAPES = [(3, 1500), (700,), (5, 50), (2, 2048)]
ROLES = [*ONE_TO_FIVE, "forget", "retain"]
LR = 1e-2


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """Nothing compiled before or after; small chunks."""
    monkeypatch.setattr(chunked, "CHUNK", 16 * BLOCK)
    monkeypatch.setattr(chunked, "SMALL", 8 * BLOCK)
    monkeypatch.setattr(chunked, "_failures", [])
    torch._dynamo.reset()
    chunked._compiled_step.cache_clear()
    yield
    chunked._compiled_step.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without the compiler: it traces and guards, and runs what it traced."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(optimizer_class, *, dtype=torch.float32, groups=1, **options):
    params = [torch.nn.Parameter(numbers(s, i).to(dtype)) for i, s in enumerate(SHAPES)]
    parts = [{"params": params[i::groups]} for i in range(groups)]
    return optimizer_class(parts, **{"lr": LR, "min_8bit_size": 1, **options}), params


def step(optimizer, params, index):
    set_role(optimizer, ROLES[index % len(ROLES)])
    for i, param in enumerate(params):
        grad = numbers(param.shape, 100 * index + i) * 10 ** (numbers(param.shape, i) / 2)
        param.grad = grad.to(param.dtype)
    optimizer.step()


def run(optimizer_class, steps=7, **options):
    optimizer, params = build(optimizer_class, **options)
    for index in range(steps):
        step(optimizer, params, index)
    return optimizer, params


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


BOUNDED = {"max_update": 10.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (DualAdamW, {}),
        (DualAdamW, {"dtype": torch.bfloat16}),
        (DualAdamWPlus, BOUNDED),
        (DualAdamWPlus, {**BOUNDED, "base_order": "base_first"}),
    ],
)
def test_32_bit_steps_are_those_of_eager_mode(optimizer_class, options):
    eager, params = run(optimizer_class, compile=False, **options)
    compiled, others = run(optimizer_class, compile=True, **options)
    assert not chunked._failures
    for param, other in zip(params, others, strict=True):
        if param.dtype == torch.bfloat16:
            # Rarely, rounding falls to the other side: one ulp.
            assert (param != other).float().mean() < 1e-2
            torch.testing.assert_close(param, other, rtol=2**-7, atol=0)
        else:
            # Rounding of float32; the bounded root of a difference magnifies it, in few entries.
            difference = (param - other).abs()
            assert (difference > 1e-5 * LR + 1e-6).float().mean() < 1e-3
            assert difference.max() < 1e-2 * LR
        for name, value in eager.state[param].items():
            twin = compiled.state[other][name]
            torch.testing.assert_close(value, twin, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (DualAdamW, {}),
        (DualAdamWPlus, BOUNDED),
        (DualAdamWPlus, {**BOUNDED, "quantize": "base"}),
        (DualAdamWPlus, {**BOUNDED, "quantize": "delta"}),
    ],
)
def test_8_bit_steps_are_those_of_eager_mode(optimizer_class, options, rounding):
    options = {**options, "state_bits": 8, "rounding": rounding}
    eager, params = run(optimizer_class, compile=False, **options)
    compiled, others = run(optimizer_class, compile=True, **options)
    assert not chunked._failures
    codes = [
        (value, compiled.state[other][name])
        for param, other in zip(params, others, strict=True)
        for name, value in eager.state[param].items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8
    ]
    one, other = (torch.cat([pair[i].flatten() for pair in codes]).int() for i in (0, 1))
    # A code that went the other way at a tie is off by one, and so, later, are those after it.
    assert (one != other).float().mean() <= 1e-3
    assert (one - other).abs().max() <= 2
    for param, other in zip(params, others, strict=True):
        # The second step's V is the difference of two numbers up to 1e7 times larger: where it is
        # all rounding, so is the step. Measured 0.15 % of the entries.
        assert ((param - other).abs() > 1e-3 * LR).float().mean() < 5e-3


@pytest.mark.slow
def test_observations_are_those_of_eager_mode():
    eager, _ = run(DualAdamWPlus, compile=False, state_bits=8, steps=1)
    compiled, _ = run(DualAdamWPlus, compile=True, state_bits=8, steps=1)
    (one,), (other,) = (x.drain_observations().values() for x in (eager, compiled))
    assert one.negative_square == other.negative_square == 0
    assert one.largest_update == pytest.approx(other.largest_update, rel=1e-6)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("optimizer_class", [DualAdamW, DualAdamWPlus])
def test_steps_of_other_roles_and_rates_compile_nothing_anew(optimizer_class, bits):
    optimizer, params = build(optimizer_class, compile=True, state_bits=bits)
    step(optimizer, params, 0)
    step(optimizer, params, 1)  # the first of its role: it observes
    step(optimizer, params, 2)  # and this one does not
    before = graphs()
    assert before
    for index in range(3, 11):
        for group in optimizer.param_groups:
            group["lr"] = LR / index
            group["weight_decay"] = 0.1 / index
        if index == 7:
            optimizer.drain_observations()
        step(optimizer, params, index)
    assert graphs() == before
    assert not chunked._failures


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_any_number_of_optimizers_compiles_in_one_process():
    # torch gives a code object up at its ninth compilation. Each of these has two: with looking
    # at what it meets, and without.
    before = graphs()
    for base_order in ("lagged", "base_first"):
        for options in ({}, BOUNDED, {"quantize": "base", "state_bits": 8}):
            run(DualAdamWPlus, steps=3, compile=True, base_order=base_order, **options)
    assert not chunked._failures
    assert graphs() - before > 8


@pytest.mark.usefixtures("traced")
def test_the_first_step_of_a_role_reports_all_groups():
    seen = []
    for compiled in (False, True):
        optimizer, params = build(DualAdamWPlus, groups=2, compile=compiled)
        for index in range(3):
            step(optimizer, params, index)
        optimizer.drain_observations()
        step(optimizer, params, 3)
        entries = sum(s.entries for s in optimizer._observed["retain"].values())
        assert entries == sum(math.prod(shape) for shape in SHAPES)
        seen.append(optimizer.drain_observations()["retain"])
    assert seen[0].negative_square > 0
    # Traced, its numbers are float32 from the start: a sum near zero may turn its sign.
    assert seen[0].negative_square == pytest.approx(seen[1].negative_square, abs=1e-3)


@pytest.mark.usefixtures("traced")
def test_later_compiled_steps_do_not_look():
    optimizer, params = build(DualAdamWPlus, compile=True)
    for index in range(6):
        step(optimizer, params, index)
    entries = [sum(s.entries for s in x.values()) for x in optimizer._observed.values()]
    assert entries == [sum(math.prod(shape) for shape in SHAPES)] * 2


@pytest.mark.usefixtures("traced")
def test_float64_parameters_are_not_compiled():
    _, params = run(DualAdamWPlus, dtype=torch.float64, compile=False)
    _, others = run(DualAdamWPlus, dtype=torch.float64, compile=True)
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
    assert chunked._compiled_step.cache_info().currsize == 0


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_compiling_fails_it_warns_once_and_steps_without(monkeypatch, bits, dtype):
    def broken(function, **options):
        def raising(*args):
            raise RuntimeError("no compiler\nsecond line")

        return raising

    _, params = run(DualAdamWPlus, dtype=dtype, compile=False, state_bits=bits)
    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, others = run(DualAdamWPlus, dtype=dtype, compile=True, state_bits=bits)
    messages = [str(warning.message) for warning in caught]
    expected = [
        "torch.compile failed, so the optimizer goes on without it, which is slower: no compiler"
    ]
    assert messages == (expected if dtype is torch.float32 else [])
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


def test_few_parameters_are_not_compiled_unless_asked(monkeypatch):
    called = []
    monkeypatch.setattr(torch, "compile", lambda *args, **options: called.append(1))
    run(DualAdamWPlus, steps=1)
    assert not called
