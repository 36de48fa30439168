"""Intervals and tests against scipy, closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from unlearn_llm.evaluation.statistics import summarise_seeds


def test_seeds_are_summarised_as_scipy_does() -> None:
    values = [0.605, 0.612, 0.598, 0.621]
    found = summarise_seeds(values, confidence=0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.n == 4


def test_one_seed_has_no_spread() -> None:
    assert summarise_seeds([0.5]) == (0.5, None, None, None, 1)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_seeds_without_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite number per seed"):
        summarise_seeds(values)


def test_a_confidence_in_percent_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        summarise_seeds([0.1, 0.2], confidence=95)
