"""What masks choose, against sorted lists and plain division."""

import math

import pytest
import torch

from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.masks import MASKS
from unlearn_llm.masks.base import build
from unlearn_llm.masks.salun import largest

SHAPES = [(30, 7), (11,), (5, 4, 3)]


class Given:
    """Gradients that stand in a table."""

    def __init__(self, **by_role):
        self.by_role = by_role
        self.asked = []

    def mean(self, role):
        self.asked.append(role)
        return [part.clone() for part in self.by_role[role]]

    mean_square = mean


def random_parts(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def first_of_sorted(values, count):
    """Positions of the largest, by Python's sort: stable, so ties stay in order."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return {i for i in order[:count]}


def marked(masks):
    return set(flat(masks).nonzero().flatten().tolist())


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_salun_marks_the_largest_gradients_of_all_tensors_together(share):
    forget = random_parts(1)
    masks = build("salun", {"share": share}).choose(Given(forget=forget))
    values = [abs(value) for value in flat(forget).tolist()]
    assert marked(masks) == first_of_sorted(values, int(share * len(values)))
    assert [(mask.dtype, mask.shape) for mask in masks] == [(torch.bool, s) for s in SHAPES]


def test_salun_minus_retain_ranks_by_the_difference():
    forget, retain = random_parts(1), random_parts(2)
    data = Given(forget=forget, retain=retain)
    masks = build("salun", {"share": 0.3, "minus_retain": True}).choose(data)
    pairs = zip(flat(forget).tolist(), flat(retain).tolist(), strict=True)
    # The difference of float32, not of doubles: what is rounded to a tie is one.
    values = [float(torch.tensor(abs(f)) - torch.tensor(abs(r))) for f, r in pairs]
    assert min(values) < 0 < max(values)
    assert marked(masks) == first_of_sorted(values, int(0.3 * len(values)))
    assert data.asked == ["forget", "retain"]


@pytest.mark.parametrize("count", range(0, 13))
def test_ties_are_marked_in_order_and_the_number_is_exact(count):
    parts = [torch.tensor([0.0, 2.0, -0.0, 2.0]), torch.tensor([[-1.0, 0.0], [2.0, 0.0]]),
             torch.tensor([1e-45, -3.0, 0.0, 3e38])]  # fmt: skip
    assert marked(largest(parts, count)) == first_of_sorted(flat(parts).tolist(), count)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_salun_refuses_gradients_that_are_not_finite(role):
    parts = {"forget": random_parts(1), "retain": random_parts(2)}
    parts[role][1][3] = math.inf
    with pytest.raises(NonFiniteError, match="Nothing was trained"):
        build("salun", {"minus_retain": True}).choose(Given(**parts))


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 3.0])
def test_sfron_marks_ratios_from_the_threshold_on(threshold):
    forget, retain = ([part.square() for part in random_parts(seed)] for seed in (1, 2))
    masks = build("sfron", {"threshold": threshold}).choose(Given(forget=forget, retain=retain))
    ratios = flat(forget).double() / flat(retain).double()
    assert torch.equal(flat(masks), ratios >= threshold)


def test_sfron_lets_move_what_has_no_gradient_on_either_side():
    # The A matrices of a fresh adapter. (0 + 1e-15) / (0 + 1e-15) of the authors is 1 too.
    zero, one = torch.zeros(1), torch.ones(1)
    data = Given(forget=[zero, zero, one], retain=[zero, one, zero])
    assert [bool(mask) for mask in build("sfron", {}).choose(data)] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("salum", {}, "Unknown mask 'salum'. Did you mean 'salun'"),
        ("salun", {"shares": 0.5}, "mask_parameters of 'salun'.*shares"),
        ("salun", {"share": 0}, "or nothing would train"),
        ("salun", {"share": 50}, "share: expected a number from 0 to 1, got 50"),
        ("sfron", {"threshold": -1}, "threshold: expected a number from 0 to inf, got -1"),
    ],
)
def test_masks_that_cannot_be_made_are_refused(name, parameters, message):
    with pytest.raises(UserError, match=message):
        build(name, parameters)


@pytest.mark.parametrize("name", list(MASKS))
def test_every_mask_cites_its_source_and_what_differs(name):
    text = MASKS[name].__doc__
    assert -1 < text.find("Source:") < text.find("Differs:")
