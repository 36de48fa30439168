"""Cutting large parameters and joining small ones must not show in the results."""

import copy

import pytest
import torch
from dual_runs import ONE_TO_FIVE, train

from unlearn_llm.optim import DualAdamW, DualAdamWPlus, chunked, set_role
from unlearn_llm.optim.codec import BLOCK

STEPS = [*ONE_TO_FIVE, "forget"]  # 7
SIZES = (1, 255, 257, 5000, 4096 + 17)
VARIANTS = {
    "dual": (DualAdamW, {"state_bits": 8}),
    "dual_stochastic": (DualAdamW, {"state_bits": 8, "rounding": "stochastic"}),
    "dual_32": (DualAdamW, {}),
    "plus": (DualAdamWPlus, {"state_bits": 8}),
    "plus_stochastic": (DualAdamWPlus, {"state_bits": 8, "rounding": "stochastic"}),
    "plus_base": (DualAdamWPlus, {"state_bits": 8, "quantize": "base"}),
    "plus_delta": (DualAdamWPlus, {"state_bits": 8, "quantize": "delta"}),
    "plus_first": (DualAdamWPlus, {"state_bits": 8, "base_order": "base_first"}),
    "plus_32": (DualAdamWPlus, {}),
}
ALL = pytest.mark.parametrize("variant", VARIANTS)


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(variant, shapes, dtype=torch.float32, **options):
    optimizer_class, settings = VARIANTS[variant]
    params = [torch.nn.Parameter(numbers(s, i).to(dtype)) for i, s in enumerate(shapes)]
    return optimizer_class(params, lr=1e-2, min_8bit_size=1, **{**settings, **options}), params


def step(optimizer, params, index, grads=None):
    """One step with gradients of its own for every parameter."""
    set_role(optimizer, STEPS[index % len(STEPS)])
    for i, param in enumerate(params):
        grad = numbers(param.shape, 1000 * (index + 1) + i) if grads is None else grads[i]
        param.grad = grad.to(param.dtype)
    optimizer.step()


def run(variant, shapes, steps=7, **options):
    optimizer, params = build(variant, shapes, **options)
    for index in range(steps):
        step(optimizer, params, index)
    return optimizer, params


def assert_same(one, other, params, others):
    for param, twin in zip(params, others, strict=True):
        assert torch.equal(param, twin)
        assert one.state[param].keys() == other.state[twin].keys()
        for name, value in one.state[param].items():
            twin_value = torch.as_tensor(other.state[twin][name])
            assert torch.equal(torch.as_tensor(value), twin_value), name


@ALL
@pytest.mark.parametrize("chunk", [BLOCK, 3 * BLOCK, 2**16])
def test_results_do_not_depend_on_the_size_of_chunks(monkeypatch, variant, chunk):
    expected, params = run(variant, SIZES)
    seen = expected.drain_observations()
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    actual, others = run(variant, SIZES)
    assert_same(expected, actual, params, others)
    assert actual.drain_observations() == seen


@ALL
def test_joined_parameters_step_as_each_does_alone(variant):
    # Not the stochastic ones: their noise is that of a place in the optimiser.
    optimizer, params = build(variant, SIZES)
    alone = []
    for i, param in enumerate(params):
        twin = torch.nn.Parameter(param.detach().clone())
        optimizer_class, settings = VARIANTS[variant]
        single = optimizer_class([twin], lr=1e-2, min_8bit_size=1, **settings)
        # The parameters before it are there, without a gradient.
        single.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(1)) for _ in range(i)]
        single.param_groups[0]["params"].append(twin)
        alone.append((single, twin))
    for index in range(len(STEPS)):
        step(optimizer, params, index)
        for (single, twin), param in zip(alone, params, strict=True):
            set_role(single, STEPS[index])
            twin.grad = param.grad.clone()
            single.step()
    for (single, twin), param in zip(alone, params, strict=True):
        assert_same(optimizer, single, [param], [twin])


@ALL
def test_joining_splits_where_a_chunk_is_full(monkeypatch, variant):
    monkeypatch.setattr(chunked, "CHUNK", 4 * BLOCK)
    calls = []
    plain = chunked._step

    def counting(piece, *rest):
        calls.append(piece.param.numel())
        return plain(piece, *rest)

    monkeypatch.setattr(chunked, "_step", counting)
    run(variant, [(300,)] * 5 + [(BLOCK,)], steps=1)
    coded = VARIANTS[variant][1].get("state_bits") == 8
    # Two of 300 fill a chunk of four blocks; joined, each takes 512.
    assert calls == ([1024, 1024, 768] if coded else [600, 600, 556])


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_those_of_float32_rounded_once(variant, dtype):
    _, params = run(variant, SIZES, steps=1, dtype=dtype)
    optimizer, twins = build(variant, SIZES)
    for i, twin in enumerate(twins):
        twin.data.copy_(twin.to(dtype))
        twin.grad = numbers(twin.shape, 1000 + i).to(dtype).float()
    set_role(optimizer, "forget")
    optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin.to(dtype))


@ALL
def test_other_layouts_of_memory_give_the_same_numbers(variant):
    optimizer, params = build(variant, [(40, 30), (40, 30), (4, 6, 5, 10)])
    strided, twins = build(variant, [(40, 30), (40, 30), (4, 6, 5, 10)])
    twins[0].data = twins[0].data.t().contiguous().t()
    twins[1].data = torch.stack([twins[1].data] * 2, -1)[..., 0]
    twins[2].data = twins[2].data.contiguous(memory_format=torch.channels_last)
    assert not any(twin.is_contiguous() for twin in twins)
    for index in range(4):
        step(optimizer, params, index)
        for twin, param in zip(twins, params, strict=True):
            twin.grad = param.grad.transpose(0, 1).contiguous().transpose(0, 1)
            assert not twin.grad.is_contiguous()
        set_role(strided, STEPS[index])
        strided.step()
    assert_same(optimizer, strided, params, twins)
    assert not any(twin.is_contiguous() for twin in twins)


@ALL
@pytest.mark.parametrize("shape", [(0,), (0, 256), (3, 0)])
def test_an_empty_parameter_has_a_state_and_disturbs_nobody(variant, shape):
    optimizer, params = run(variant, [(300,), shape])
    expected, others = run(variant, [(300,)])
    assert_same(expected, optimizer, others, params[:1])
    # Under FSDP2 a rank may hold no rows of a parameter; all ranks save the same names.
    state = optimizer.state[params[1]]
    assert state["forget_mean"].shape == state["retain_square"].shape == shape
    assert state["retain_steps"] == 5
    alone, (empty,) = run(variant, [shape], steps=1)
    assert alone.state[empty]["forget_steps"] == 1


@ALL
def test_a_scalar_parameter_is_stepped(variant):
    _, (scalar,) = run(variant, [()])
    _, (entry,) = build(variant, [(1,)])
    with torch.no_grad():
        entry.copy_(numbers((), 0))
    optimizer = VARIANTS[variant][0]([entry], lr=1e-2, min_8bit_size=1, **VARIANTS[variant][1])
    for index in range(len(STEPS)):
        step(optimizer, [entry], index, [numbers((), 1000 * (index + 1)).view(1)])
    assert torch.equal(scalar.view(1), entry)


@ALL
def test_a_parameter_without_gradient_is_left_alone(variant):
    optimizer, params = run(variant, [(300,), (600,)])
    before, state = params[1].detach().clone(), copy.deepcopy(optimizer.state[params[1]])
    twin = copy.deepcopy(optimizer)
    params[0].grad, params[1].grad = numbers((300,), 5), None
    optimizer.step()
    assert torch.equal(params[1], before)
    for name, value in state.items():
        assert torch.equal(
            torch.as_tensor(optimizer.state[params[1]][name]), torch.as_tensor(value)
        )
    # Now the two have stepped differently often: they are not joined, and each is as alone.
    step(optimizer, params, 3)
    first, second = twin.param_groups[0]["params"]
    set_role(twin, STEPS[-1])
    first.grad, second.grad = numbers((300,), 5), None
    twin.step()
    for param, other in ((params[0], first), (params[1], second)):
        for one in (first, second):
            one.grad = None
        other.grad = param.grad.clone()
        set_role(twin, STEPS[3])
        twin.step()
    assert_same(optimizer, twin, params, [first, second])


@ALL
def test_gradients_of_zero_only_decay(variant):
    optimizer, params = build(variant, SIZES, weight_decay=0.5)
    starts = [param.detach().clone() for param in params]
    for index in range(3):
        step(optimizer, params, index, [torch.zeros(size) for size in SIZES])
    for param, start in zip(params, starts, strict=True):
        for _ in range(3):
            start.mul_(1 - 1e-2 * 0.5)
        assert torch.equal(param, start)
        for name, value in optimizer.state[param].items():
            if name.endswith("_scale") or (
                isinstance(value, torch.Tensor) and value.dtype == torch.float32
            ):
                assert not value.any(), name
    seen = optimizer.drain_observations()
    assert all(one == (0.0, 0.0) for one in seen.values())


@ALL
def test_what_fills_a_block_meets_what_zeros_meet(variant):
    optimizer, params = build(variant, [(300,)])
    filled, (twin,) = build(variant, [(2 * BLOCK,)])
    with torch.no_grad():
        twin.zero_()[:300] = params[0]
    for index in range(len(STEPS)):
        step(optimizer, params, index)
        step(filled, [twin], index, [torch.nn.functional.pad(params[0].grad, (0, 212))])
    assert torch.equal(twin[:300], params[0])
    one, other = optimizer.drain_observations(), filled.drain_observations()
    assert one.keys() == other.keys()
    for role, seen in one.items():
        assert seen.largest_update == other[role].largest_update
        assert seen.negative_square * 300 == pytest.approx(other[role].negative_square * 512)


@ALL
def test_zeros_after_real_gradients_keep_the_state_finite(variant):
    optimizer, params = (
        run(variant, SIZES, max_update=10.0) if "plus" in variant else run(variant, SIZES)
    )
    for index in range(8):
        step(optimizer, params, index, [torch.zeros(size) for size in SIZES])
    for param in params:
        assert param.isfinite().all()
        for name, value in optimizer.state[param].items():
            assert torch.as_tensor(value).isfinite().all(), name


def test_parameters_of_one_call_may_have_any_mixture_of_types():
    shapes, dtypes = [(300,)] * 4, (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    params = [
        torch.nn.Parameter(numbers(shape, i).to(dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    groups = [{"params": params[:3]}, {"params": params[3:], "state_bits": 32}]
    together = DualAdamWPlus(groups, lr=1e-2, state_bits=8, min_8bit_size=1)
    for index in range(3):
        step(together, params, index)
    for i, param in enumerate(params):
        twin = torch.nn.Parameter(numbers(shapes[i], i).to(dtypes[i]))
        alone = DualAdamWPlus([twin], lr=1e-2, state_bits=32 if i == 3 else 8, min_8bit_size=1)
        for index in range(3):
            grads = [numbers((300,), 1000 * (index + 1) + i)]
            train(alone, [twin], [STEPS[index]], grads)
        assert_same(together, alone, [param], [twin])
