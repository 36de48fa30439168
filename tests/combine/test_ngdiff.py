"""NGDiff's learning rate, on quadratics whose best rate is known."""

import pytest
import torch

from unlearn_llm.combine import COMBINATIONS, Step
from unlearn_llm.combine.ngdiff import parabola_minimum
from unlearn_llm.combine.vectors import whole
from unlearn_llm.errors import UserError


class Bowl:
    """Retain loss 1/2 curvature |weight - bottom|^2, and passes counted."""

    def __init__(self, weight, bottom, curvature=1.0):
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.bottom = torch.tensor(bottom, dtype=torch.float64)
        self.curvature = curvature
        self.parameters = [self.weight]
        self.reduce = whole
        self.n_losses = 0

    def loss(self, role):
        self.n_losses += 1
        return self._loss().item()

    def _loss(self):
        return 0.5 * self.curvature * ((self.weight - self.bottom) ** 2).sum()

    def step(self, combination, optimizer, number=0):
        before = self._loss().item()
        self.weight.grad = self.curvature * (self.weight - self.bottom).detach()
        combination.before_step(number, self)
        optimizer.step()
        rate = optimizer.param_groups[0]["lr"]
        combination.after_step(Step({"forget": 0.0, "retain": before}, rate, self))


def test_the_lowest_point_of_a_parabola():
    # (s - 3)^2 at -1, 0, 1: 16, 9, 4.
    assert parabola_minimum(16.0, 9.0, 4.0) == 3.0


@pytest.mark.parametrize(
    "losses",
    [
        (1.0, 2.0, 1.0),  # concave
        (3.0, 2.0, 1.0),  # a line
        (1.0, 2.0, 4.0),  # downhill behind
        (2.0 + 3e-7, 2.0, 2.0),  # rounding
        (float("nan"), 2.0, 1.0),
        (4.0, 2.0, float("inf")),
    ],
)
def test_where_the_parabola_says_nothing_the_rate_stays(losses):
    assert parabola_minimum(*losses) is None


@pytest.mark.parametrize(
    ("rate", "factor"),
    [
        # The best rate of gradient descent on curvature c is 1/c = 0.5.
        (0.5, 1.0),
        (0.4, 0.9 + 0.1 * 1.25),
        (1.0, 0.9 + 0.1 * 0.5),
        (0.01, 0.9 + 0.1 * 2.0),  # 50 times too small: clipped to 2
    ],
)
def test_a_probe_moves_the_rate_towards_the_best_one(rate, factor):
    bowl = Bowl([3.0, -1.0], [1.0, 1.0], curvature=2.0)
    ngdiff = COMBINATIONS["ngdiff"](probe_every=10)
    bowl.step(ngdiff, torch.optim.SGD(bowl.parameters, lr=rate))
    assert ngdiff.learning_rate_scale() == pytest.approx(factor)
    # The step was made with the new rate.
    expected = torch.tensor([3.0, -1.0]) - rate * factor * 2 * torch.tensor([2.0, -2.0])
    torch.testing.assert_close(bowl.weight.detach().float(), expected)


def test_moments_see_the_gradient_of_a_probe_once():
    plain, probed = Bowl([3.0], [1.0]), Bowl([3.0], [1.0])
    optimizers = [torch.optim.AdamW(bowl.parameters, lr=0.1) for bowl in (plain, probed)]
    plain.step(COMBINATIONS["ngdiff"](), optimizers[0])
    probed.step(COMBINATIONS["ngdiff"](probe_every=1), optimizers[1])
    one, other = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_probe_that_says_nothing_leaves_the_step_as_it_is():
    plain, probed = Bowl([3.0], [1.0], curvature=-1.0), Bowl([3.0], [1.0], curvature=-1.0)
    plain.step(COMBINATIONS["ngdiff"](), torch.optim.AdamW(plain.parameters, lr=0.1))
    ngdiff = COMBINATIONS["ngdiff"](probe_every=1)
    probed.step(ngdiff, torch.optim.AdamW(probed.parameters, lr=0.1))
    assert torch.equal(plain.weight, probed.weight)
    assert ngdiff.learning_rate_scale() == 1.0


def test_a_probe_costs_two_losses_every_tenth_step():
    bowl = Bowl([3.0], [1.0])
    ngdiff = COMBINATIONS["ngdiff"](probe_every=10)
    optimizer = torch.optim.SGD(bowl.parameters, lr=1e-3)
    for number in range(20):
        bowl.step(ngdiff, optimizer, number)
    assert bowl.n_losses == 4


def test_the_scale_is_kept():
    first, second = (COMBINATIONS["ngdiff"](probe_every=1) for _ in range(2))
    bowl = Bowl([3.0], [1.0])
    bowl.step(first, torch.optim.SGD(bowl.parameters, lr=0.1))
    second.load_state_dict(first.state_dict())
    assert second.learning_rate_scale() == first.learning_rate_scale() != 1.0


@pytest.mark.parametrize("probe_every", [0, 1.5, True, "x"])
def test_the_probing_interval_is_a_number_of_steps(probe_every):
    with pytest.raises(UserError, match="probe_every: expected a number of steps"):
        COMBINATIONS["ngdiff"](probe_every=probe_every)
