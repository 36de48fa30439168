"""The bound on DualOptim+'s steps, and what the steps report."""

import math

import pytest
import torch
from dual_runs import ONE_TO_FIVE, random_grads, train

from unlearn_llm.optim import DualAdamW, DualAdamWPlus

LR = 1e-2
WIDTHS = pytest.mark.parametrize("bits", [32, 8])


def run(grads, roles, **options):
    """Weights after every step, and the optimiser."""
    size = grads[0].shape
    param = torch.nn.Parameter(torch.linspace(-1, 1, size.numel(), dtype=grads[0].dtype))
    optimizer = DualAdamWPlus([param], lr=LR, **{"weight_decay": 0.5, **options})
    weights = [param.detach().clone()]
    for role, grad in zip(roles, grads, strict=True):
        train(optimizer, [param], [role], [grad])
        weights.append(param.detach().clone())
    return torch.stack(weights), optimizer


def moves(weights):
    """Steps without the decay, in units of the learning rate."""
    return (weights[1:] - weights[:-1] * (1 - LR * 0.5)) / LR


ROLES = ONE_TO_FIVE * 4


@WIDTHS
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_no_entry_moves_by_more_than_the_bound(bound, bits):
    grads = random_grads(len(ROLES), (3000,), dtype=torch.float32)
    options = {"state_bits": bits, "min_8bit_size": 1}
    free, _ = run(grads, ROLES, **options)
    assert moves(free).abs().max() > 4 * bound
    bounded, _ = run(grads, ROLES, max_update=bound, **options)
    # A float32 weight of 1 is rounded by 6e-8, which is 6e-6 learning rates.
    assert moves(bounded).abs().max() <= bound + 2e-5
    assert (moves(bounded).abs() > bound - 2e-5).any()


@WIDTHS
def test_a_bound_that_nothing_meets_changes_nothing(bits):
    grads = random_grads(len(ROLES), (3000,), dtype=torch.float32)
    options = {"state_bits": bits, "min_8bit_size": 1}
    free, _ = run(grads, ROLES, **options)
    bounded, _ = run(grads, ROLES, max_update=1e30, **options)
    assert torch.equal(bounded, free)


def test_the_bound_leaves_the_moments_alone():
    grads = random_grads(len(ROLES), (50,))
    _, free = run(grads, ROLES)
    _, bounded = run(grads, ROLES, max_update=0.1)
    for one, other in zip(free.state.values(), bounded.state.values(), strict=True):
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def observed_by_hand(series, roles, betas=(0.9, 0.95)):
    """Second moments and updates of one entry, from the published formulas."""
    mean = dict.fromkeys(roles, 0.0)
    square, count = dict(mean), dict.fromkeys(roles, 0)
    base_mean = base_square = 0.0
    seen = []
    for step, (role, g) in enumerate(zip(roles, series, strict=True)):
        count[role] += 1
        shared = [
            0.0 if step == 0 else base / (1 - beta**step)
            for base, beta in zip((base_mean, base_square), betas, strict=True)
        ]
        mean[role] = betas[0] * mean[role] + (1 - betas[0]) * (g - shared[0])
        square[role] = betas[1] * square[role] + (1 - betas[1]) * (g * g - shared[1])
        top = mean[role] / (1 - betas[0] ** count[role]) + shared[0]
        power = square[role] / (1 - betas[1] ** count[role]) + shared[1]
        seen.append((role, power, abs(top) / (math.sqrt(abs(power)) + 1e-8)))
        base_mean = betas[0] * base_mean + (1 - betas[0]) * g
        base_square = betas[1] * base_square + (1 - betas[1]) * g * g
    return seen


@pytest.mark.parametrize("max_update", [None, 0.5])
def test_observations_are_those_of_a_hand_calculation(max_update):
    sizes = (3, 40)
    # Of very different sizes, so that second moments of both roles come out negative.
    sizes_of_steps = 10 ** torch.stack(random_grads(len(ROLES), (), seed=1))
    grads = [
        [
            grad * s
            for grad, s in zip(random_grads(len(ROLES), (n,), n), sizes_of_steps, strict=True)
        ]
        for n in sizes
    ]
    params = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in sizes]
    # Two groups: what is reported is of both.
    optimizer = DualAdamWPlus([{"params": [param]} for param in params], max_update=max_update)
    for role, *both in zip(ROLES, *grads, strict=True):
        for param, grad in zip(params, both, strict=True):
            param.grad = grad
        for group in optimizer.param_groups:
            group["role"] = role
        optimizer.step()
    met = [
        one
        for of_param in grads
        for entry in torch.stack(of_param).T.tolist()
        for one in observed_by_hand(entry, ROLES)
    ]
    drained = optimizer.drain_observations()
    assert drained.keys() == {"forget", "retain"}
    for role, got in drained.items():
        powers = [power for one, power, _ in met if one == role]
        fraction = sum(power < 0 for power in powers) / len(powers)
        assert 0.01 < fraction < 0.5
        assert got.negative_square == pytest.approx(fraction, abs=1e-12)
        assert got.largest_update == pytest.approx(max(u for one, _, u in met if one == role))


def test_observations_are_given_once():
    _, optimizer = run(random_grads(1), ["forget"])
    assert optimizer.drain_observations().keys() == {"forget"}
    assert optimizer.drain_observations() == {}
    train(optimizer, optimizer.param_groups[0]["params"], ["retain"], random_grads(1, seed=1))
    assert optimizer.drain_observations().keys() == {"retain"}


def test_a_first_step_is_adams_and_has_no_negative_square():
    _, optimizer = run(random_grads(1), ["forget"])
    seen = optimizer.drain_observations()["forget"]
    assert seen.negative_square == 0
    assert seen.largest_update == pytest.approx(1, rel=1e-6)  # g / (|g| + eps)


def test_steps_that_nobody_drains_take_no_memory():
    _, optimizer = run(random_grads(len(ROLES)), ROLES)
    kept = [seen for by_device in optimizer._observed.values() for seen in by_device.values()]
    assert len(kept) == 2  # one sum per role


def test_dualoptim_meets_nothing():
    param = torch.nn.Parameter(torch.ones(7))
    optimizer = DualAdamW([param])
    train(optimizer, [param], ROLES[:6], random_grads(6))
    assert optimizer.drain_observations() == {}
