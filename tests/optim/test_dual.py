import copy
import json
import math

import numpy as np
import pytest
import torch
from dual_runs import CLASSES, ONE_TO_FIVE, make, random_grads, train

from unlearn_llm.optim import OPTIMIZERS, DualAdamW, DualAdamWPlus, set_role

VARIANTS = {
    "dualoptim_plus_lagged": lambda params, **options: DualAdamWPlus(params, **options),
    "dualoptim_plus_base_first": lambda params, **options: DualAdamWPlus(
        params, base_order="base_first", **options
    ),
    "dualoptim": lambda params, base_betas, **options: DualAdamW(params, **options),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("index", [0, 1])
def test_trajectories_are_those_of_the_oracle(shared, index, variant):
    # Origin: dualoptim_plus_trajectories.json, the released step function run in float64.
    oracle = json.loads((shared / "oracles" / "dualoptim_plus_trajectories.json").read_text())
    case = oracle["cases"][index]
    param = torch.nn.Parameter(torch.tensor(case["params0"], dtype=torch.float64))
    optimizer = VARIANTS[variant](
        [param],
        lr=case["lr"],
        betas=tuple(case["betas"]),
        base_betas=tuple(case["base_betas"]),
        eps=case["eps"],
        weight_decay=case["weight_decay"],
        forget_lr_scale=case["forget_lr_ratio"],
    )
    grads = [torch.tensor(grad, dtype=torch.float64) for grad in case["grads"]]
    for step, (role, grad) in enumerate(zip(case["objectives"], grads, strict=True), start=1):
        train(optimizer, [param], [role], [grad])
        if str(step) in case[variant]:
            expected = torch.tensor(case[variant][str(step)], dtype=torch.float64)
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)
    assert str(step) in case[variant]  # the last step was compared


# Origin: methods.md 3.3, "TEST VECTOR" (released function on CPU in float64); nine decimals.
VECTOR_FORGET = [[0.3, -1.0], [0.1, -0.8], [-0.2, -1.2]]
VECTOR_RETAIN = [
    [0.2, 0.5],
    [0.25, 0.4],
    [0.1, 0.6],
    [0.3, 0.45],
    [0.15, 0.55],
    [0.2, 0.5],
    [0.05, 0.7],
    [0.35, 0.3],
    [0.2, 0.52],
    [0.22, 0.48],
]
VECTOR_EXPECTED = {
    "dualoptim_plus_lagged": {
        1: [0.989900000, -0.489950000],
        2: [0.979801011, -0.499901005],
        3: [0.969511601, -0.563850754],
        6: [0.940729031, -0.678856086],
        7: [0.929795694, -0.671301780],
        13: [0.879440916, -0.750447247],
    },
    "dualoptim_plus_base_first": {
        1: [0.989900000, -0.489950000],
        2: [0.979801011, -0.499901005],
        3: [0.969682915, -0.515456149],
        6: [0.941465732, -0.563482323],
        7: [0.932662772, -0.558286442],
        13: [0.887572247, -0.613978077],
    },
    "dualoptim": {
        1: [0.989900000, -0.489950000],
        2: [0.979801011, -0.499901005],
        3: [0.969734088, -0.509759655],
        6: [0.941234118, -0.539335767],
        7: [0.932340379, -0.529373193],
        13: [0.883646482, -0.568259139],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_test_vector_is_reproduced(variant):
    param = torch.nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
    optimizer = VARIANTS[variant]([param], lr=0.01, base_betas=(0.9, 0.95), weight_decay=0.01)
    left = {"forget": list(VECTOR_FORGET), "retain": list(VECTOR_RETAIN)}
    for step, role in enumerate([*ONE_TO_FIVE, *ONE_TO_FIVE, "forget"], start=1):
        grad = torch.tensor(left[role].pop(0), dtype=torch.float64)
        train(optimizer, [param], [role], [grad])
        if step in VECTOR_EXPECTED[variant]:
            expected = torch.tensor(VECTOR_EXPECTED[variant][step], dtype=torch.float64)
            torch.testing.assert_close(param.detach(), expected, rtol=0, atol=6e-10)


class Twin:
    """The formulas of methods.md 3.2 and 3.3, one number at a time, for one coordinate."""

    def __init__(self, kind, theta, *, betas, base_betas, eps, weight_decay, ratio):
        self.kind, self.theta = kind, theta
        self.b1, self.b2 = betas
        self.a1, self.a2 = base_betas
        self.eps, self.wd, self.ratio = eps, weight_decay, ratio
        self.B1 = self.B2 = 0.0
        self.D1 = {"forget": 0.0, "retain": 0.0}
        self.D2 = {"forget": 0.0, "retain": 0.0}
        self.n = {"forget": 0, "retain": 0}
        self.t = 0

    def step(self, k, g, eta_t):
        eta = eta_t * (self.ratio if k == "forget" else 1.0)
        self.t += 1
        self.n[k] += 1
        self.theta = self.theta * (1 - eta * self.wd)
        if self.kind == "base_first":
            self.B1 = self.a1 * self.B1 + (1 - self.a1) * g
            self.B2 = self.a2 * self.B2 + (1 - self.a2) * g**2
        seen = self.t if self.kind == "base_first" else self.t - 1
        if self.kind == "dual" or seen == 0:
            Bh1 = Bh2 = 0.0
        else:
            Bh1 = self.B1 / (1 - self.a1**seen)
            Bh2 = self.B2 / (1 - self.a2**seen)
        self.D1[k] = self.b1 * self.D1[k] + (1 - self.b1) * (g - Bh1)
        self.D2[k] = self.b2 * self.D2[k] + (1 - self.b2) * (g**2 - Bh2)
        M = self.D1[k] / (1 - self.b1 ** self.n[k]) + Bh1
        V = self.D2[k] / (1 - self.b2 ** self.n[k]) + Bh2
        self.theta = self.theta - eta * M / (math.sqrt(abs(V)) + self.eps)
        if self.kind == "lagged":
            self.B1 = self.a1 * self.B1 + (1 - self.a1) * g
            self.B2 = self.a2 * self.B2 + (1 - self.a2) * g**2


@pytest.mark.parametrize("retain_steps", [2, 5])
@pytest.mark.parametrize("kind", ["lagged", "base_first", "dual"])
def test_updates_agree_with_a_slow_twin(kind, retain_steps):
    rng = np.random.default_rng(retain_steps)
    steps, size = 40, 16
    betas, base_betas = (0.8, 0.97), (0.95, 0.9)
    common = {"eps": 1e-6, "weight_decay": 0.1}
    start = rng.normal(size=size)
    twins = [
        Twin(kind, theta, betas=betas, base_betas=base_betas, ratio=1.7, **common)
        for theta in start
    ]
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    options = {"betas": betas, "forget_lr_scale": 1.7, **common}
    if kind == "dual":
        optimizer = DualAdamW([param], **options)
    else:
        optimizer = DualAdamWPlus([param], base_betas=base_betas, base_order=kind, **options)
    for step in range(steps):
        role = "forget" if step % (1 + retain_steps) == 0 else "retain"
        lr = 1e-2 * (step + 1) / steps
        grad = rng.normal(size=size) * (3.0 if role == "forget" else 1.0)
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, [param], [role], [torch.from_numpy(grad)])
        for twin, g in zip(twins, grad, strict=True):
            twin.step(role, float(g), lr)
    expected = torch.tensor([twin.theta for twin in twins], dtype=torch.float64)
    # Not 1e-15: where the second moment crosses zero the update magnifies rounding.
    torch.testing.assert_close(param.detach(), expected, rtol=1e-11, atol=1e-11)
    means = torch.tensor([twin.D1["forget"] for twin in twins], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[param]["forget_mean"], means)


@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_dual_adamw_with_one_role_is_adamw(dtype, tolerance, role):
    optimizer, param = make(DualAdamW, dtype, weight_decay=0.1)
    other = torch.nn.Parameter(param.detach().clone())
    adamw = torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    grads = random_grads(50, dtype=dtype)
    train(optimizer, [param], [role] * 50, grads)
    for grad in grads:
        other.grad = grad
        adamw.step()
    torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize(("role", "idle"), [("forget", "retain"), ("retain", "forget")])
def test_a_step_leaves_the_other_roles_state_untouched(optimizer_class, role, idle):
    optimizer, param = make(optimizer_class)
    train(optimizer, [param], ["forget", "retain"], random_grads(2))
    before = copy.deepcopy(optimizer.state[param])
    train(optimizer, [param], [role], random_grads(1, seed=1))
    after = optimizer.state[param]
    for name in (f"{idle}_mean", f"{idle}_square", f"{idle}_steps"):
        assert torch.equal(torch.as_tensor(after[name]), torch.as_tensor(before[name]))
    for name in (f"{role}_mean", f"{role}_square"):
        assert not torch.equal(after[name], before[name])


def test_the_base_hears_both_roles():
    optimizer, param = make(DualAdamWPlus, base_betas=(0.5, 0.5))
    ones = torch.ones(7, dtype=torch.float64)
    train(optimizer, [param], ["forget", "retain"], [ones, 3 * ones])
    # By hand: 0.5 * (0.5 * 1) + 0.5 * 3 = 1.75, and with squares 0.25 * 1 + 0.5 * 9 = 4.75.
    torch.testing.assert_close(optimizer.state[param]["base_mean"], 1.75 * ones)
    torch.testing.assert_close(optimizer.state[param]["base_square"], 4.75 * ones)


@pytest.mark.parametrize("base_order", ["lagged", "base_first"])
def test_equal_constant_gradients_leave_nothing_to_the_deltas(base_order):
    optimizer, param = make(DualAdamWPlus, base_order=base_order, weight_decay=0.0)
    grad = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    train(optimizer, [param], ["forget", "retain"] * 500, [grad] * 1000)
    before = param.detach().clone()
    for role in ("forget", "retain"):
        # 0.95 ** 500 = 7e-12 is what is left of the first, baseless step.
        assert optimizer.state[param][f"{role}_mean"].abs().max() < 1e-10
        assert optimizer.state[param][f"{role}_square"].abs().max() < 1e-10
    train(optimizer, [param], ["forget"], [grad])
    torch.testing.assert_close(before - param.detach(), torch.full_like(grad, 1e-2))


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_parameter_without_gradient_keeps_its_value_and_its_phase(optimizer_class):
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(2)) for _ in range(2)], lr=1e-2)
    first, second = optimizer.param_groups[0]["params"]
    roles = [*ONE_TO_FIVE, *ONE_TO_FIVE]
    for step, role in enumerate(roles):
        set_role(optimizer, role)
        first.grad = torch.full((2,), float(role == "forget"))
        second.grad = None if step == 3 else torch.full((2,), float(role == "forget"))
        before = second.detach().clone()
        optimizer.step()
        assert (step == 3) == torch.equal(second, before)
    # Only forget steps had a gradient of 1, so retain moments would show one that strayed.
    if optimizer_class is DualAdamW:
        assert torch.equal(optimizer.state[second]["retain_mean"], torch.zeros(2))
    assert optimizer.state[second]["forget_steps"] == 2
    assert optimizer.state[second]["retain_steps"] == 9
    assert optimizer.state[first]["retain_steps"] == 10


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_forget_steps_use_the_scaled_rate_also_for_the_decay(optimizer_class):
    moved = {}
    for role in ("forget", "retain"):
        optimizer, param = make(optimizer_class, forget_lr_scale=3.0, weight_decay=0.5)
        start = param.detach().clone()
        train(optimizer, [param], [role], [torch.zeros(7)])
        moved[role] = param.detach() - start
    torch.testing.assert_close(moved["forget"], 3 * moved["retain"])


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_step_before_anybody_set_a_role_is_a_retain_step(optimizer_class):
    optimizer, param = make(optimizer_class)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (optimizer.state[param]["forget_steps"], optimizer.state[param]["retain_steps"]) == (
        0,
        1,
    )


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_parameters_are_updated_in_float32(optimizer_class, dtype):
    optimizer, param = make(optimizer_class, dtype)
    twin, precise = make(optimizer_class, torch.float32)
    precise.data.copy_(param)
    grad = random_grads(1)[0].to(dtype)
    train(optimizer, [param], ["forget"], [grad])
    train(twin, [precise], ["forget"], [grad.float()])
    assert torch.equal(param, precise.to(dtype))
    assert optimizer.state[param]["forget_mean"].dtype == torch.float32


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(optimizer_class):
    optimizer, param = make(optimizer_class)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > (param**2).sum()


def test_groups_keep_their_own_settings_and_share_the_role():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = DualAdamWPlus(
        [{"params": params[:1], "weight_decay": 0.0, "base_betas": (0.5, 0.5)}], weight_decay=0.1
    )
    optimizer.add_param_group({"params": params[1:]})
    set_role(optimizer, "forget")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert [group["base_betas"] for group in optimizer.param_groups] == [(0.5, 0.5), (0.9, 0.95)]
    assert [group["role"] for group in optimizer.param_groups] == ["forget", "forget"]


def test_set_role_works_on_an_optimizer_that_ignores_roles():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param])
    set_role(optimizer, "forget")
    param.grad = torch.ones(2)
    optimizer.step()


def test_optimizers_are_registered_by_name():
    assert OPTIMIZERS["dual_adamw"] is DualAdamW
    assert OPTIMIZERS["dual_adamw_plus"] is DualAdamWPlus
    assert issubclass(OPTIMIZERS["dual_adamw_plus"], DualAdamW)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_an_unknown_role_is_refused_before_anything_moves(optimizer_class):
    optimizer, param = make(optimizer_class)
    with pytest.raises(ValueError, match="must be 'forget' or 'retain'; got 'joint'"):
        set_role(optimizer, "joint")
    before = param.detach().clone()
    optimizer.param_groups[0]["role"] = "Forget"
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="got 'Forget'"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr: expected a finite number of at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr: .* got nan"),
        ({"eps": -1.0}, "eps: .* got -1.0"),
        ({"weight_decay": float("inf")}, "weight_decay: .* got inf"),
        ({"forget_lr_scale": -2.0}, "forget_lr_scale: .* got -2.0"),
        ({"betas": (0.9, 1.0)}, r"^betas: expected .* got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"^betas: .* got \(0.9,\)"),
        ({"base_betas": (-0.1, 0.9)}, r"base_betas: .* got \(-0.1, 0.9\)"),
        ({"base_order": "first"}, "base_order: expected 'lagged' or 'base_first', got 'first'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DualAdamWPlus([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_sparse_gradients_are_refused(optimizer_class):
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = optimizer_class(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"got a sparse one for parameter 0 of shape \(4, 2\)"):
        optimizer.step()
