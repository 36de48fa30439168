"""What a checkpoint of the optimisers keeps: torch.save and torch.distributed.checkpoint."""

import copy
import io

import pytest
import torch
from dual_runs import CLASSES, ONE_TO_FIVE, make, random_grads, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from unlearn_llm.optim import DualAdamW, DualAdamWPlus


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # trap 6: as the Trainer loads


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 8, 12])
def test_a_resumed_run_is_the_uninterrupted_run(optimizer_class, dtype, stop):
    roles, grads = ONE_TO_FIVE * 4, random_grads(24)
    optimizer, param = make(optimizer_class, dtype, forget_lr_scale=2.0)
    train(optimizer, [param], roles, grads)

    first, stopped = make(optimizer_class, dtype, forget_lr_scale=2.0)
    train(first, [stopped], roles[:stop], grads[:stop])
    resumed = torch.nn.Parameter(stopped.detach().clone())
    second = optimizer_class([resumed], lr=1.0)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0]["role"] == roles[stop - 1]
    train(second, [resumed], roles[stop:], grads[stop:])

    assert torch.equal(resumed, param)
    for name, value in optimizer.state[param].items():
        assert torch.equal(torch.as_tensor(second.state[resumed][name]), torch.as_tensor(value))


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_float32_moments_of_bfloat16_parameters_survive_loading(optimizer_class):
    optimizer, param = make(optimizer_class, torch.bfloat16)
    train(optimizer, [param], ["forget"] * 3, random_grads(3))
    fresh, other = make(optimizer_class, torch.bfloat16)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for name, value in optimizer.state[param].items():
        loaded = fresh.state[other][name]
        assert type(loaded) is type(value)
        if isinstance(value, torch.Tensor):
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, value)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_distributed_checkpoint_restores_both_roles_into_a_fresh_optimizer(
    optimizer_class, flatten
):
    # Trap 5: DCP fills the fresh optimiser by one fake step, which knows one role only.
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    roles, grads = ONE_TO_FIVE * 2, random_grads(12, (3, 3))

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3))
        model.to(torch.bfloat16)
        model[1].requires_grad_(False)
        return model, optimizer_class(model.parameters(), lr=1e-2)

    model, optimizer = build()
    train(optimizer, [model[0].weight], roles[:8], grads[:8])
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    train(optimizer, [model[0].weight], roles[8:], grads[8:])

    resumed_model, resumed = build()
    resumed_model.load_state_dict(weights)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    train(resumed, [resumed_model[0].weight], roles[8:], grads[8:])

    expected = optimizer.state[model[0].weight]
    actual = resumed.state[resumed_model[0].weight]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(value)), name
    assert torch.equal(resumed_model[0].weight, model[0].weight)


def test_a_saved_group_without_our_keys_gets_the_constructors_values():
    optimizer, _ = make(DualAdamWPlus)
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["role"]
    del state_dict["param_groups"][0]["base_order"]
    fresh, _ = make(DualAdamWPlus, base_order="base_first")
    fresh.load_state_dict(state_dict)
    assert fresh.param_groups[0]["role"] == "retain"
    assert fresh.param_groups[0]["base_order"] == "base_first"


def test_the_state_of_another_optimizer_is_refused():
    optimizer, param = make(DualAdamW)
    train(optimizer, [param], ["forget"], random_grads(1))
    fresh, _ = make(DualAdamWPlus)
    with pytest.raises(ValueError, match=r"not written by DualAdamWPlus.*base_mean"):
        fresh.load_state_dict(optimizer.state_dict())


def test_a_copied_optimizer_continues_like_the_original():
    optimizer, param = make(DualAdamWPlus)
    train(optimizer, [param], ["forget", "retain"], random_grads(2))
    twin = copy.deepcopy(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    grads = random_grads(3, seed=2)
    train(optimizer, [param], ["retain"] * 3, grads)
    train(twin, [copied], ["retain"] * 3, grads)
    assert torch.equal(param, copied)
