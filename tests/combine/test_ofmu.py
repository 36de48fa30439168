"""OFMU, against second derivatives by autograd."""

import pytest
import torch

from unlearn_llm.combine import COMBINATIONS
from unlearn_llm.combine.vectors import whole
from unlearn_llm.errors import UserError


class Problem:
    """Two smooth losses of seven weights in two parameters; passes counted."""

    def __init__(self, poison=None):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((2, 2), (3,))
        ]
        self.matrices = {
            role: torch.randn(7, 7, generator=generator, dtype=torch.float64)
            for role in ("forget", "retain")
        }
        self.reduce, self.poison, self.n_gradients = whole, poison, 0

    def value(self, role, parameters):
        weights = torch.cat([p.flatten() for p in parameters])
        return torch.tanh(self.matrices[role] @ weights).square().sum()

    def gradient(self, role):
        self.n_gradients += 1
        found = torch.autograd.grad(self.value(role, self.parameters), self.parameters)
        if self.n_gradients == self.poison:
            found[0].mul_(float("nan"))
        return list(found)


def expected(problem, inner_steps, inner_rate, beta, rho):
    """Inner iterate and outer gradient, with exact second derivatives."""

    def flat_gradient(value, parameters, create_graph=False):
        found = torch.autograd.grad(value, parameters, create_graph=create_graph)
        return torch.cat([g.flatten() for g in found])

    weights = [p.detach().clone().requires_grad_() for p in problem.parameters]

    def inner_gradient():
        g_f, g_r = (
            flat_gradient(problem.value(role, weights), weights, create_graph=True)
            for role in ("forget", "retain")
        )
        cosine = torch.nn.functional.cosine_similarity(g_f, g_r, dim=0)
        return flat_gradient(problem.value("forget", weights) - beta * cosine, weights)

    for _ in range(inner_steps):
        step = inner_gradient().split([w.numel() for w in weights])
        with torch.no_grad():
            for w, s in zip(weights, step, strict=True):
                w -= inner_rate * s.view_as(w)
    v = inner_gradient()
    g_f = flat_gradient(problem.value("forget", weights), weights, create_graph=True)
    product = flat_gradient(g_f @ v, weights)  # H_f v
    g_r = flat_gradient(problem.value("retain", weights), weights)
    return torch.cat([w.detach().flatten() for w in weights]), g_r + 2 * rho * product


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_step_is_that_of_exact_second_derivatives(beta):
    settings = {"inner_steps": 3, "inner_rate": 0.01, "beta": beta, "rho": 0.2}
    problem = Problem()
    iterate, outer = expected(problem, **settings)
    direction = COMBINATIONS["ofmu"](**settings, difference=1e-5).combine(problem)
    # Central differences err by the square of the distance, 1e-10, and by rounding, 1e-11.
    torch.testing.assert_close(flat(problem.parameters), iterate, rtol=0, atol=1e-7)
    torch.testing.assert_close(flat(direction), outer, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "n_gradients"), [(0.0, 3 + 4), (0.5, 6 * 3 + 9)])
def test_passes_are_those_that_the_docstring_names(beta, n_gradients):
    problem = Problem()
    COMBINATIONS["ofmu"](inner_steps=3, beta=beta).combine(problem)
    assert problem.n_gradients == n_gradients


@pytest.mark.parametrize("poison", [1, 4, 7])
def test_weights_are_put_back_where_a_gradient_is_not_finite(poison):
    problem = Problem(poison)
    before = flat(problem.parameters).clone()
    direction = COMBINATIONS["ofmu"](inner_steps=3, beta=0.0).combine(problem)
    assert not flat(direction).isfinite().all()
    assert torch.equal(flat(problem.parameters), before)


def test_rho_grows_to_its_bound_and_is_kept():
    ofmu = COMBINATIONS["ofmu"](inner_steps=0, beta=0.0, rho=0.5, growth=1.5, rho_max=1.0)
    seen = []
    for _ in range(3):
        ofmu.combine(Problem())
        seen.append(ofmu.rho)
    assert seen == [0.75, 1.0, 1.0]
    other = COMBINATIONS["ofmu"]()
    other.load_state_dict(ofmu.state_dict())
    assert other.rho == 1.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"inner_steps": 1.5}, "inner_steps: expected a whole number"),
        ({"growth": 0.9}, "growth: expected a number from 1"),
        ({"difference": 1}, "difference: expected a number from 1e-06 to 0.1"),
    ],
)
def test_parameters_that_cannot_work_are_refused(parameters, message):
    with pytest.raises(UserError, match=message):
        COMBINATIONS["ofmu"](**parameters)
