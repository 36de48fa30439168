"""Combinations that learn the weights of losses, on problems with known solutions."""

import math

import numpy as np
import pytest
import torch

from unlearn_llm.combine import COMBINATIONS, Step
from unlearn_llm.combine.gradients import surgery
from unlearn_llm.combine.vectors import Gram
from unlearn_llm.combine.weights import dual_derivative
from unlearn_llm.errors import UserError


class Problem:
    """Two losses of one vector, descended with the weights of a combination."""

    def __init__(self, losses, start, learning_rate):
        self.losses, self.learning_rate = losses, learning_rate
        self.theta = np.array(start, dtype=float)
        self.n_losses = 0

    def loss(self, role):
        self.n_losses += 1
        return self.losses[role][0](self.theta)

    def gradient(self, role):
        return self.losses[role][1](self.theta)

    def step(self, combination):
        before = {role: value(self.theta) for role, (value, _) in self.losses.items()}
        by = combination.weights()
        direction = by.forget * self.gradient("forget") + by.retain * self.gradient("retain")
        self.theta = self.theta - self.learning_rate * direction
        combination.after_step(Step(before, self.learning_rate, self))


def line(slope):
    slope = np.array(slope)
    return (lambda theta: float(slope @ theta), lambda theta: slope)


def bowl(bottom):
    bottom = np.array(bottom)
    return (
        lambda theta: float(0.5 * ((theta - bottom) ** 2).sum()),
        lambda theta: theta - bottom,
    )


# Implicit surgery.


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("name", ["implicit_surgery", "implicit_surgery_fast"])
def test_lambda_is_learned_to_the_multiplier_of_exact_surgery(name, eps):
    # Constant gradients g_f = (1, 0), g_r = (-2, 1): lambda* = (2 - eps) / 5.
    problem = Problem({"forget": line([1, 0]), "retain": line([-2, 1])}, [0, 0], 0.1)
    combination = COMBINATIONS[name](rate=0.05, eps=eps)
    for _ in range(200):
        problem.step(combination)
    exact = surgery(Gram(1.0, -2.0, 5.0), eps=eps).retain
    assert exact == pytest.approx((2 - eps) / 5)
    assert combination.lam == pytest.approx(exact, abs=1e-6)


def test_on_a_quadratic_lambda_follows_the_closed_form():
    # Forget pulls to (2, 0), retain to (0, 0); from (0, 1). Kept on its level line of the retain
    # loss, a circle, theta ends where forget is lowest on it, and there lambda = (2 - r) / r.
    problem = Problem({"forget": bowl([2, 0]), "retain": bowl([0, 0])}, [0, 1], 0.01)
    combination = COMBINATIONS["implicit_surgery"](rate=1.0)
    for _ in range(4000):
        problem.step(combination)
    radius = np.linalg.norm(problem.theta)
    np.testing.assert_allclose(problem.theta, [radius, 0], atol=1e-3)
    assert combination.lam == pytest.approx((2 - radius) / radius, abs=1e-3)
    g_f, g_r = problem.gradient("forget"), problem.gradient("retain")
    exact = surgery(Gram(g_f @ g_f, g_f @ g_r, g_r @ g_r)).retain
    assert combination.lam == pytest.approx(exact, abs=1e-3)


def test_without_conflict_lambda_stays_at_zero():
    problem = Problem({"forget": line([1, 0]), "retain": line([2, 1])}, [0, 0], 0.1)
    combination = COMBINATIONS["implicit_surgery"](initial=0.5, rate=0.05)
    for _ in range(50):
        problem.step(combination)
    assert combination.lam == 0


def test_lambda_is_bounded():
    problem = Problem({"forget": line([1, 0]), "retain": line([-2, 1])}, [0, 0], 0.1)
    combination = COMBINATIONS["implicit_surgery"](rate=0.05, lambda_max=0.25)
    for _ in range(50):
        problem.step(combination)
    assert combination.lam == 0.25


def test_the_sign_of_eps_is_the_papers_or_the_codes():
    # A step of rate 0.1 that changes nothing: delta = +-eps.
    paper = COMBINATIONS["implicit_surgery"](initial=1.0, rate=1.0, eps=0.25)
    code = COMBINATIONS["implicit_surgery"](
        initial=1.0, rate=1.0, eps=0.25, eps_means="improvement"
    )
    for combination in (paper, code):
        combination.learn(2.0, 2.0, 0.1)
    assert (paper.lam, code.lam) == (0.75, 1.25)
    assert dual_derivative(2.0, 2.5, 0.1, 0.25) == pytest.approx(-4.75)


def test_the_extra_pass_is_one_loss_per_step_and_the_fast_form_has_none():
    for name, n_losses in (("implicit_surgery", 10), ("implicit_surgery_fast", 0)):
        problem = Problem({"forget": line([1, 0]), "retain": line([-2, 1])}, [0, 0], 0.1)
        combination = COMBINATIONS[name]()
        for _ in range(10):
            problem.step(combination)
        assert problem.n_losses == n_losses


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_teaches_nothing(after):
    combination = COMBINATIONS["implicit_surgery"](initial=1.0)
    combination.learn(2.0, after, 0.1)
    assert combination.lam == 1.0


def test_a_step_of_learning_rate_zero_teaches_nothing():
    problem = Problem({"forget": line([1, 0]), "retain": line([-2, 1])}, [0, 0], 0.0)
    for name in ("implicit_surgery", "implicit_surgery_fast"):
        combination = COMBINATIONS[name](initial=0.5, eps=1.0)
        for _ in range(3):
            problem.step(combination)
        assert combination.lam == 0.5


# PDU.


def test_the_dual_variable_by_hand():
    pdu = COMBINATIONS["pdu"](initial=1.0, eps=0.5, rate=2.0, warmup_steps=1)
    seen = []
    for loss in (9.0, 1.0, 0.25, 0.0, 0.0, 0.0):
        pdu.after_step(Step({"forget": 0.0, "retain": loss}, 0.1, None))
        seen.append(pdu.lam)
    # frozen; 1 + 2 * 0.5; 2 - 2 * 0.25; 1.5 - 2 * 0.5; ...; never below 0.
    assert seen == [1.0, 2.0, 1.5, 0.5, 0.0, 0.0]
    assert pdu.weights() == (1.0, 0.0)


def test_pdu_ends_where_the_constraint_holds_with_its_multiplier():
    # min 1/2 |theta - 2|^2 subject to 1/2 theta^2 <= 1/2: theta = 1, lambda = (2 - 1) / 1.
    problem = Problem({"forget": bowl([2.0]), "retain": bowl([0.0])}, [0.5], 0.05)
    pdu = COMBINATIONS["pdu"](initial=0.0, eps=0.5, rate=0.1)
    for _ in range(3000):
        problem.step(pdu)
    assert problem.theta[0] == pytest.approx(1, abs=1e-4)
    assert pdu.lam == pytest.approx(1, abs=1e-4)


# FAMO.


def test_famo_against_autograd_and_torchs_adam():
    # The twin: logits in torch, the gradient of z . (log l(t) - log l(t+1)) by autograd.
    losses = [(2.0, 3.0), (1.5, 2.9), (1.6, 2.0), (0.7, 1.9)]
    famo = COMBINATIONS["famo"](rate=0.025, decay=1e-2)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=1e-2)
    before = None
    for pair in losses:
        famo.after_step(Step(dict(zip(("forget", "retain"), pair, strict=True)), 0.1, None))
        now = torch.tensor(pair, dtype=torch.float64)
        if before is not None:
            adam.zero_grad()
            (logits.softmax(0) * (before.log() - now.log())).sum().backward()
            adam.step()
        before = now
        weights = logits.softmax(0) / now
        torch.testing.assert_close(
            torch.tensor(famo.weights(), dtype=torch.float64), (weights / weights.sum()).detach()
        )


def test_famo_refuses_losses_without_a_logarithm():
    with pytest.raises(UserError, match="famo takes logarithms"):
        COMBINATIONS["famo"]().after_step(Step({"forget": -1.0, "retain": 1.0}, 0.1, None))


# All of them.


@pytest.mark.parametrize("name", ["implicit_surgery", "implicit_surgery_fast", "pdu", "famo"])
def test_a_combination_goes_on_from_its_state(name):
    whole, first, second = (COMBINATIONS[name]() for _ in range(3))
    problems = [Problem({"forget": bowl([2.0]), "retain": bowl([0.3])}, [1.2], 1e-3) for _ in "ab"]
    for _ in range(3):
        problems[0].step(whole)
        problems[1].step(first)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        problems[0].step(whole)
        problems[1].step(second)
    assert second.weights() == whole.weights()
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("implicit_surgery", {"eps_means": "x"}, "eps_means: expected tolerance or improvement"),
        ("implicit_surgery", {"initial": 11}, "initial: expected a number from 0 to 10"),
        ("pdu", {"rate": -1}, "rate: expected a number from 0"),
        ("famo", {"rate": "x"}, "rate: expected a number"),
    ],
)
def test_parameters_that_cannot_work_are_refused(name, parameters, message):
    with pytest.raises(UserError, match=message):
        COMBINATIONS[name](**parameters)
