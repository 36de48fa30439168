import math

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from unlearn_llm.evaluation import scores
from unlearn_llm.evaluation.scores import Score


def test_mean_skips_and_counts_what_was_not_measured() -> None:
    assert scores.mean([1.0, None, 3.0]) == Score(2.0, 2, "1 of 3 rows not measured")
    assert scores.mean([1.0, 3.0]) == Score(2.0, 2, None)


def test_nothing_measured_is_no_number() -> None:
    assert scores.mean([]) == Score(None, None, "0 of 0 rows measured")
    assert scores.mean([None, None]) == Score(None, None, "0 of 2 rows measured")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_no_number(broken: float) -> None:
    score = scores.mean([0.5, broken])
    assert score.value is None
    assert score.note == "1 values are not finite"


def test_truth_ratio_forms_by_hand() -> None:
    ratios = [0.25, 2.0, None]
    # max(0, 1 - r): .75 and 0. min(r, 1/r): .25 and .5. 1 / (1 + r): .8 and 1/3.
    assert scores.truth_ratio_nonforget(ratios).value == pytest.approx(0.375)
    assert scores.truth_ratio_forget(ratios).value == pytest.approx(0.375)
    assert scores.truth_ratio_forget_ufe(ratios).value == pytest.approx(0.625)
    assert scores.truth_ratio_share(ratios).value == pytest.approx((0.8 + 1 / 3) / 2)
    assert scores.truth_ratio_forget([2.0], eps=0.5).value == pytest.approx(1 / 2.5)
    assert scores.truth_ratio_forget([0.0]).value == 0.0


def test_maximum_and_fraction_show_what_a_mean_hides() -> None:
    column = [0.0, 0.1, 0.9, None]
    assert scores.maximum(column).value == 0.9
    assert scores.fraction(column).value == pytest.approx(1 / 3)
    assert scores.fraction(column, at_least=0.1).value == pytest.approx(2 / 3)


def test_harmonic_mean_is_scipys() -> None:
    values = np.random.default_rng(0).uniform(0.01, 1, 18)
    members = {str(index): Score(float(value)) for index, value in enumerate(values)}
    assert scores.harmonic_mean(members).value == pytest.approx(hmean(values), abs=1e-15)


def test_harmonic_mean_is_zero_if_a_member_is() -> None:
    assert scores.harmonic_mean({"a": Score(0.0), "b": Score(0.9)}).value == 0.0
    assert scores.harmonic_mean({"a": Score(5e-324), "b": Score(0.9)}).value == 0.0


def test_harmonic_mean_refuses_what_has_none() -> None:
    score = scores.harmonic_mean({"a": Score(-0.1), "b": Score(0.9)})
    assert score == Score(None, None, "cannot be made of a -0.1, b 0.9")
    missing = {"a": Score(0.5), "b": Score.missing("no judge"), "c": Score.missing("no probe")}
    assert scores.harmonic_mean(missing).note == "needs b (no judge); c (no probe)"


def test_forget_quality_of_two_rows_by_hand() -> None:
    # Of the C(4, 2) = 6 orders of two and two values, D = 1 in two: p = 1/3.
    quality = scores.forget_quality({"0": 1.0, "1": 2.0}, {"1": 4.0, "0": 3.0})
    assert quality == Score(pytest.approx(1 / 3), 2, None)
    assert scores.ks_statistic({"0": 1.0, "1": 2.0}, {"1": 4.0, "0": 3.0}).value == 1.0


def test_forget_quality_does_not_depend_on_the_direction_of_the_ratio() -> None:
    draw = np.random.default_rng(0)
    ratios = {str(i): float(r) for i, r in enumerate(draw.lognormal(0, 1, 40))}
    reference = {str(i): float(r) for i, r in enumerate(draw.lognormal(0.5, 1, 40))}
    quality = scores.forget_quality(ratios, reference).value
    inverse = scores.forget_quality(
        {row: 1 / r for row, r in ratios.items()}, {row: 1 / r for row, r in reference.items()}
    ).value
    assert quality == pytest.approx(inverse, rel=1e-12)


def test_forget_quality_refuses_other_rows() -> None:
    fewer = scores.forget_quality({"0": 1.0, "1": 2.0}, {"0": 1.0})
    assert fewer.value is None
    assert fewer.note == ("the reference has other rows: 2 here, 1 there, 1 in one of them only")
    assert scores.forget_quality({"0": 1.0}, {"1": 1.0}).value is None
    assert scores.forget_quality({"0": None}, {"0": 1.0}).note == "no row measured in both"
    assert scores.forget_quality({"0": math.nan}, {"0": 1.0}).value is None


def test_mia_auc_is_the_share_of_pairs_won() -> None:
    # Pairs (forget, holdout): (1, 2) won, (1, 1) tied, (3, 2) and (3, 1) lost.
    auc = scores.mia_auc([1.0, 3.0, None], [2.0, 1.0])
    assert auc == Score(1.5 / 4, 4, "1 of 5 rows not measured")
    assert scores.mia_auc([0.0, 0.1], [1.0, 2.0]).value == 1.0
    assert scores.mia_auc([], [1.0]).value is None
    assert scores.mia_auc([math.nan], [1.0]).value is None


def test_privleak_by_hand() -> None:
    assert scores.privleak(1.0, 0.5) == pytest.approx(-100.0)
    assert scores.privleak(0.5, 0.5) == 0.0
    assert scores.privleak(0.25, 0.5) == pytest.approx(50.0)
    assert scores.privleak(0.4, 1.0) == pytest.approx(6e11)


def test_the_distance_is_scipys_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    for n, decimals in ((1, 3), (2, 3), (50, 1), (300, 6)):
        first, second = (rng.normal(shift, size=n).round(decimals).tolist() for shift in (0, 0.4))
        here, there = ({str(i): v for i, v in enumerate(side)} for side in (first, second))
        expected = ks_2samp(first, second).statistic
        assert scores.ks_statistic(here, there).value == pytest.approx(expected, abs=1e-12)
