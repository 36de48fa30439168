"""What a checkpoint of 8-bit moments keeps: torch.save and torch.distributed.checkpoint."""

import copy
import io

import pytest
import torch
from dual_runs import CLASSES, ONE_TO_FIVE, random_grads, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from unlearn_llm.optim import DualAdamW, DualAdamWPlus

SHAPE = (5, 512)
ROLES = ONE_TO_FIVE * 3
BOTH = pytest.mark.parametrize("optimizer_class", CLASSES)
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(optimizer_class, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in (SHAPE, (30, 70))]
    settings = {"lr": 1e-2, "state_bits": 8, "min_8bit_size": 1, **options}
    return optimizer_class(params, **settings), params


def run(optimizer, params, roles, first=0):
    """Steps of which each has its own gradients, by number."""
    for index, role in enumerate(roles, start=first):
        for param in params:
            param.grad = random_grads(1, param.shape, seed=index)[0].to(param.dtype)
        for group in optimizer.param_groups:
            group["role"] = role
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # trap 6: as the Trainer loads


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        twin = other[name]
        assert type(twin) is type(value), name
        if isinstance(value, torch.Tensor):
            assert twin.dtype == value.dtype, name
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin)), name


@BOTH
@DTYPES
@ROUNDINGS
@pytest.mark.parametrize("stop", [1, 8])
def test_a_resumed_run_is_the_uninterrupted_run(optimizer_class, dtype, rounding, stop):
    optimizer, params = make(optimizer_class, dtype, rounding=rounding)
    run(optimizer, params, ROLES)

    first, stopped = make(optimizer_class, dtype, rounding=rounding)
    run(first, stopped, ROLES[:stop])
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in stopped]
    second = optimizer_class(resumed, lr=1.0)  # the groups bring their settings
    second.load_state_dict(through_a_file(first.state_dict()))
    run(second, resumed, ROLES[stop:], first=stop)

    for param, twin in zip(params, resumed, strict=True):
        assert torch.equal(param, twin)
        assert_equal_states(optimizer.state[param], second.state[twin])


@BOTH
@DTYPES
def test_loaded_codes_are_bytes_and_scales_float32(optimizer_class, dtype):
    optimizer, params = make(optimizer_class, dtype)
    run(optimizer, params, ROLES[:3])
    fresh, others = make(optimizer_class, dtype)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for param, other in zip(params, others, strict=True):
        assert_equal_states(optimizer.state[param], fresh.state[other])
        kinds = {value.dtype for name, value in fresh.state[other].items() if "_steps" not in name}
        assert kinds == {torch.uint8, torch.float32}


@BOTH
def test_moments_keep_the_width_that_they_were_saved_in(optimizer_class):
    for saved_bits, bits in ((32, 8), (8, 32)):
        optimizer, params = make(optimizer_class, state_bits=saved_bits)
        run(optimizer, params, ROLES[:3])
        fresh, others = make(optimizer_class, state_bits=bits)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fresh.param_groups[0]["state_bits"] == saved_bits
        width = torch.uint8 if saved_bits == 8 else torch.float32
        assert fresh.state[others[0]]["forget_mean"].dtype == width


def test_8_bit_moments_of_another_optimizer_are_refused():
    optimizer, params = make(DualAdamW)
    run(optimizer, params, ROLES[:1])
    fresh, _ = make(DualAdamWPlus)
    with pytest.raises(ValueError, match=r"not written by DualAdamWPlus.*forget_mean_scale"):
        fresh.load_state_dict(optimizer.state_dict())


@BOTH
@ROUNDINGS
def test_a_copied_optimizer_continues_like_the_original(optimizer_class, rounding):
    optimizer, params = make(optimizer_class, rounding=rounding)
    run(optimizer, params, ROLES[:4])
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"]
    run(optimizer, params, ROLES[4:8], first=4)
    run(twin, copied, ROLES[4:8], first=4)
    for param, other in zip(params, copied, strict=True):
        assert torch.equal(param, other)
        assert_equal_states(optimizer.state[param], twin.state[other])


@pytest.mark.parametrize("flatten", [False, True])
@ROUNDINGS
@pytest.mark.parametrize(
    ("optimizer_class", "quantize"),
    [(DualAdamW, {}), *((DualAdamWPlus, {"quantize": part}) for part in ("all", "base", "delta"))],
)
def test_distributed_checkpoint_restores_codes_into_a_fresh_optimizer(
    optimizer_class, quantize, rounding, flatten
):
    # Trap 5: DCP fills the fresh optimiser by one fake step, which knows one role only.
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    grads = random_grads(12, (8, 300), dtype=torch.float32)
    roles = ROLES[:12]

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 8, bias=False), torch.nn.Linear(8, 3))
        model[1].requires_grad_(False)
        settings = {"lr": 1e-2, "state_bits": 8, "min_8bit_size": 256, "rounding": rounding}
        return model, optimizer_class(model.parameters(), **settings, **quantize)

    model, optimizer = build()
    train(optimizer, [model[0].weight], roles[:8], grads[:8])
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    train(optimizer, [model[0].weight], roles[8:], grads[8:])

    resumed_model, resumed = build()
    resumed_model.load_state_dict(weights)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    train(resumed, [resumed_model[0].weight], roles[8:], grads[8:])

    assert_equal_states(optimizer.state[model[0].weight], resumed.state[resumed_model[0].weight])
    assert torch.equal(resumed_model[0].weight, model[0].weight)
