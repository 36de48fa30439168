"""Combinations of two gradients, against hand calculations and brute-force programs."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from unlearn_llm.combine import COMBINATIONS
from unlearn_llm.combine import gradients as gradients_module
from unlearn_llm.combine.base import Combination
from unlearn_llm.combine.vectors import CHUNK, Gram, dots, gram
from unlearn_llm.errors import UserError

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def gradients(seed=0, conflict=None, dtype=torch.float64):
    """Two random gradients over three parameters; `conflict` chooses the sign of the product."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (
        [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES] for _ in "fr"
    )
    if conflict is not None and (gram(forget, retain).cross < 0) is not conflict:
        retain = [-tensor for tensor in retain]
    return forget, retain


def flat(gradient):
    return np.concatenate([tensor.double().flatten().numpy() for tensor in gradient])


def combined(name, forget, retain, **parameters):
    retain = [tensor.clone() for tensor in retain]
    return flat(COMBINATIONS[name](**parameters)(forget, retain))


# Products.


def test_products_are_over_all_parameters():
    # Per parameter: (1, 2).(3, 4) = 11 and (5).(-1) = -5.
    forget = [torch.tensor([1.0, 2.0]), torch.tensor([[5.0]])]
    retain = [torch.tensor([3.0, 4.0]), torch.tensor([[-1.0]])]
    assert gram(forget, retain) == Gram(30.0, 6.0, 26.0)
    assert gram(forget, retain).cosine == pytest.approx(6 / math.sqrt(30 * 26))


def test_products_of_bfloat16_gradients_are_summed_in_float32():
    ones = [torch.ones(3 * CHUNK + 1, dtype=torch.bfloat16)]
    assert dots([(ones, ones)]) == [3 * CHUNK + 1]


def test_shards_of_several_ranks_add_up():
    forget, retain = gradients()
    whole = gram(forget, retain)
    seen = []

    def keep(partial_sums):
        seen.append(partial_sums)
        return partial_sums

    for part in (slice(0, 1), slice(1, 3)):
        gram(forget[part], retain[part], keep)
    assert (seen[0] + seen[1]).tolist() == pytest.approx(list(whole))
    doubled = gram(forget, retain, lambda partial_sums: 2 * partial_sums)
    assert doubled == pytest.approx([2 * product for product in whole])


@pytest.mark.parametrize("name", ["surgery", "pcgrad", "mgda", "ngdiff", "blur", "gru"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_the_direction_so(name, side, value):
    # A direction that hides it would let the step pass the check of the gradient norm.
    pair = gradients()
    pair[side][1][2] = value
    assert not np.isfinite(combined(name, *pair)).all()


@pytest.mark.parametrize("name", ["surgery", "pcgrad", "mgda", "ngdiff", "blur", "gru"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_gradient_of_zero_gives_a_finite_direction(name, side):
    pair = gradients()
    for tensor in pair[side]:
        tensor.zero_()
    assert np.isfinite(combined(name, *pair)).all()


# Surgery.


@pytest.mark.parametrize("eps", [0.0, 0.7, 100.0])
@pytest.mark.parametrize("conflict", [True, False])
def test_surgery_solves_its_quadratic_program(eps, conflict):
    forget, retain = gradients(conflict=conflict)
    g_f, g_r = flat(forget), flat(retain)
    # Brute force: the nearest vector in the half-space, by a general solver.
    solved = minimize(
        lambda d: 0.5 * ((d - g_f) ** 2).sum(),
        np.zeros_like(g_f),
        jac=lambda d: d - g_f,
        constraints=[LinearConstraint(g_r, -eps, np.inf)],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert solved.success
    # SLSQP stops at about the root of ftol.
    np.testing.assert_allclose(combined("surgery", forget, retain, eps=eps), solved.x, atol=1e-6)


def test_after_surgery_the_retain_loss_does_not_rise_to_first_order():
    forget, retain = gradients(conflict=True)
    d, g_r = combined("surgery", forget, retain), flat(retain)
    assert g_r @ d == pytest.approx(0, abs=1e-12)
    # A quadratic with that gradient: the rise is of second order in the step, 1/2 step^2 |d|^2.
    for step in (1e-2, 1e-3):
        rise = (-step * d) @ g_r + 0.5 * step**2 * (d @ d)
        assert rise <= 0.51 * step**2 * (d @ d)


def test_surgery_without_conflict_leaves_the_forget_gradient_alone():
    forget, retain = gradients(conflict=False)
    np.testing.assert_array_equal(combined("surgery", forget, retain), flat(forget))


# PCGrad.


def test_pcgrad_by_hand():
    # g_f = (1, 0), g_r = (-1, 1): <g_f, g_r> = -1. g_f - (-1/2) g_r = (1/2, 1/2);
    # g_r - (-1/1) g_f = (0, 1). The sum is (1/2, 3/2).
    forget, retain = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    np.testing.assert_allclose(combined("pcgrad", forget, retain), [0.5, 1.5])


@pytest.mark.parametrize("seed", range(5))
def test_after_pcgrad_nothing_conflicts(seed):
    forget, retain = gradients(seed, conflict=True)
    d = combined("pcgrad", forget, retain)
    assert d @ flat(forget) >= 0
    assert d @ flat(retain) >= 0


def test_pcgrad_without_conflict_is_the_sum():
    forget, retain = gradients(conflict=False)
    np.testing.assert_array_equal(combined("pcgrad", forget, retain), flat(forget) + flat(retain))


# MGDA.


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_mgda_is_the_shortest_vector_between_the_gradients(seed, scale):
    forget, retain = gradients(seed)
    retain = [scale * tensor for tensor in retain]
    d = combined("mgda", forget, retain)
    shares = np.linspace(0, 1, 20001)[:, None]
    between = shares * flat(forget) + (1 - shares) * flat(retain)
    lengths = np.linalg.norm(between, axis=1)
    assert np.linalg.norm(d) <= lengths.min() + 1e-12
    np.testing.assert_allclose(d, between[lengths.argmin()], atol=1e-3)  # of a grid


def test_mgda_of_one_gradient_twice_is_that_gradient():
    forget, _ = gradients()
    np.testing.assert_allclose(combined("mgda", forget, forget), flat(forget))


def test_normalised_mgda_is_half_of_ngdiff():
    forget, retain = gradients()
    ours = combined("mgda", forget, retain, normalize="l2")
    np.testing.assert_allclose(ours, combined("ngdiff", forget, retain) / 2, atol=1e-12)


# NGDiff.


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("conflict", [True, False])
def test_ngdiff_raises_neither_loss_to_first_order(conflict, scale):
    forget, retain = gradients(conflict=conflict)
    forget = [scale * tensor for tensor in forget]
    d = combined("ngdiff", forget, retain)
    assert d @ flat(retain) >= 0
    # The gradient of the forget set's negative likelihood is -g_f under ascent.
    assert d @ -flat(forget) <= 0
    expected = flat(forget) / np.linalg.norm(flat(forget)) + flat(retain) / np.linalg.norm(
        flat(retain)
    )
    np.testing.assert_allclose(d, expected)


# BLUR.


def test_blur_by_hand():
    # g_f = (2, 0), g_r = (3, 1): the part of g_r off g_f is (0, 1).
    forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([3.0, 1.0])]
    np.testing.assert_allclose(combined("blur", forget, retain), [2, 1])
    np.testing.assert_allclose(combined("blur", forget, retain, gamma=0.5), [1, 1])
    np.testing.assert_allclose(combined("blur", forget, retain, alpha=4.0), [2, 4])


# GRU.


def test_gru_by_hand():
    gru = COMBINATIONS["gru"]()

    def step(forget, retain):
        return flat(gru([torch.tensor(forget)], [torch.tensor(retain)]))

    # m = (0, 1); <g_f, m> = -1: g_f = (1, -1) loses its part along m.
    np.testing.assert_allclose(step([1.0, -1.0], [0.0, 1.0]), [1, 0])
    # m = 0.8 (1, 0) + 0.2 (0, 1) = (0.8, 0.2); no conflict with (1, 0).
    np.testing.assert_allclose(step([1.0, 0.0], [1.0, 0.0]), [1, 0])
    # m = 0.8 (1, 0) + 0.2 (0.8, 0.2) = (0.96, 0.04); <g_f, m> = -0.96, |m|^2 = 0.9232.
    d = np.array([-1, 0]) + 0.96 / 0.9232 * np.array([0.96, 0.04])
    np.testing.assert_allclose(step([-1.0, 0.0], [1.0, 0.0]), d, atol=1e-6)


def test_gru_takes_away_no_more_than_the_clipped_cosine():
    forget, retain = [torch.tensor([0.0, -2.0])], [torch.tensor([0.0, 3.0])]
    np.testing.assert_allclose(combined("gru", forget, retain), [0, 0], atol=1e-6)
    np.testing.assert_allclose(
        combined("gru", forget, retain, clip_cosine=-0.5), [0, -1], atol=1e-6
    )


def test_gru_may_add_the_retain_gradient_after_the_projection():
    forget, retain = gradients(conflict=True)
    plain = combined("gru", forget, retain)
    added = combined("gru", forget, retain, retain_coefficient=2.0)
    np.testing.assert_allclose(added, plain + 2 * flat(retain))
    assert plain @ flat(retain) == pytest.approx(0, abs=1e-12)


def test_gru_goes_on_from_its_state():
    whole, first = COMBINATIONS["gru"](), COMBINATIONS["gru"]()
    for seed in (0, 1):
        whole(*gradients(seed))
        first(*gradients(seed))
    second = COMBINATIONS["gru"]()
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(flat(whole(*gradients(2))), flat(second(*gradients(2))))


# Sources.


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != "sum"])
def test_every_combination_cites_its_source_and_what_differs(name):
    formula = getattr(gradients_module, name, None)
    text = inspect.getdoc(formula or COMBINATIONS[name])
    assert text.index("Source:") < text.index("Differs:")


# Parameters.


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("surgery", {"eps": -1.0}, "eps: expected a number from 0"),
        ("surgery", {"eps": "x"}, "eps: expected a number"),
        ("mgda", {"normalize": "l1"}, "normalize: expected none or l2"),
        ("gru", {"average": 2}, "average: expected a number from 0 to 1"),
        ("gru", {"clip_cosine": 0.5}, "clip_cosine: expected a number from -1 to 0"),
    ],
)
def test_parameters_that_cannot_work_are_refused(name, parameters, message):
    with pytest.raises(UserError, match=message):
        COMBINATIONS[name](**parameters)


def test_a_subclass_that_lacks_its_method_is_told_which():
    class Mine(Combination):
        gradients = True

    class Projected(gradients_module.Projection):
        pass

    with pytest.raises(NotImplementedError, match=r"Mine .* must define combine\(window\)"):
        Mine().combine(None)
    with pytest.raises(NotImplementedError, match=r"Projected .* must define coefficients"):
        Projected()(*gradients())


def test_unknown_combinations_are_answered_with_a_name():
    with pytest.raises(UserError, match="Did you mean 'surgery'"):
        COMBINATIONS["surgry"]
