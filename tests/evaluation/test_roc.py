"""ROC curves and the interval of their area, against sklearn, resampling and simulations."""

import numpy as np
import pytest
from scipy import stats

from unlearn_llm.evaluation import scores
from unlearn_llm.evaluation.aggregates import AGGREGATES
from unlearn_llm.evaluation.roc import auc_interval, roc_curve, tpr_at


def drawn(seed: int, n: int = 60, shift: float = 1.0, ties: bool = False):
    rng = np.random.default_rng(seed)
    forget, holdout = rng.normal(0, 1, n), rng.normal(shift, 1, n + 7)
    return (np.rint(forget), np.rint(holdout)) if ties else (forget, holdout)


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_and_its_area_are_sklearns(ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    forget, holdout = drawn(0, ties=ties)
    member = np.r_[np.ones(len(forget)), np.zeros(len(holdout))]
    values = np.r_[forget, holdout]
    fpr, tpr, _ = metrics.roc_curve(member, -values, drop_intermediate=False)
    curve = roc_curve(forget, holdout)
    assert set(map(tuple, np.c_[curve.fpr, curve.tpr].round(12))) <= set(
        map(tuple, np.c_[fpr, tpr].round(12))
    )
    assert ties or len(curve.fpr) < len(fpr)
    for allowed in (0.0, 0.01, 0.05, 0.3, 1.0):
        assert tpr_at(curve, allowed) == tpr[fpr <= allowed].max()
    # The published direction: forget 0, holdout 1, the score as it is.
    auc = metrics.roc_auc_score(1 - member, values)
    assert scores.mia_auc(list(forget), list(holdout)).value == pytest.approx(auc, rel=1e-12)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auc, rel=1e-12)


def test_tpr_at_a_low_fpr_by_hand() -> None:
    curve = roc_curve(np.array([0.0, 1.0, 2.0, 9.0]), np.array([1.5, 5.0, 6.0, 7.0]))
    assert tpr_at(curve, 0.01) == 0.5  # both below 1.5, where no holdout row is named
    assert tpr_at(curve, 0.25) == 0.75
    assert tpr_at(curve, 1.0) == 1.0
    columns = {"forget": {"m": [0.0, 1.0, None, 9.0]}, "holdout": {"m": [1.5, 5.0]}}
    assert AGGREGATES["mia_tpr"](columns, metric="m").value == pytest.approx(2 / 3)


def test_variance_is_delongs_double_sum() -> None:
    forget, holdout = drawn(1, 25, ties=True)
    wins = (holdout > forget[:, None]) + 0.5 * (holdout == forget[:, None])
    auc = wins.mean()
    variance = wins.mean(1).var(ddof=1) / len(forget) + wins.mean(0).var(ddof=1) / len(holdout)
    found = auc_interval(forget, holdout)
    logit = np.log([found.low / (1 - found.low), found.high / (1 - found.high)])
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (auc * (1 - auc))
    assert np.diff(logit) == pytest.approx(2 * half, rel=1e-10)
    assert logit.mean() == pytest.approx(np.log(auc / (1 - auc)), rel=1e-10)
    assert found.method == "DeLong (logit) by row"


def test_interval_is_near_that_of_a_stratified_bootstrap() -> None:
    forget, holdout = drawn(2, 150)

    def auc(first, second, axis=-1):
        wins = second[..., None, :] > first[..., :, None]
        return wins.mean((-2, -1))

    resampled = stats.bootstrap(
        (forget, holdout), auc, n_resamples=2000, method="percentile", batch=100, rng=0
    ).confidence_interval
    found = auc_interval(forget, holdout)
    assert (found.low, found.high) == pytest.approx(tuple(resampled), abs=0.008)


def test_intervals_cover_what_they_should() -> None:
    for shift in (0.0, 1.0, 2.0):
        truth = stats.norm.cdf(shift / np.sqrt(2))
        intervals = [auc_interval(*drawn(seed, 40, shift)) for seed in range(400)]
        held = np.mean([each.low <= truth <= each.high for each in intervals])
        assert 0.92 <= held <= 0.98  # binomial: 0.95 +- 0.03 in 400


def test_rows_of_one_author_are_not_counted_as_many() -> None:
    held = {True: 0, False: 0}
    groups = [str(author) for author in range(20) for _ in range(10)]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of_author = rng.normal(0, 1, (2, 20)).repeat(10, axis=1)
        forget, holdout = of_author + rng.normal(0, 0.5, (2, 200))
        for grouped in held:
            sides = (groups, groups) if grouped else ()
            found = auc_interval(forget, holdout, *sides)
            held[grouped] += found.low <= 0.5 <= found.high
    assert held[True] / 200 >= 0.91
    assert held[False] / 200 < 0.6


def test_a_perfect_attack_has_a_bound_and_not_certainty() -> None:
    found = auc_interval(np.arange(20.0), np.arange(20.0) + 50)
    assert found.high == 1.0
    assert 0.85 < found.low < 0.95
    mirrored = auc_interval(np.arange(20.0) + 50, np.arange(20.0))
    assert (mirrored.low, mirrored.high) == pytest.approx((0.0, 1 - found.low))
    # An observed 1 is as unlikely as it should be if the area is at the bound (binormal).
    rng = np.random.default_rng(0)
    shift = np.sqrt(2) * stats.norm.ppf(found.low)
    draws = rng.normal(0, 1, (4000, 20)).max(1) < rng.normal(shift, 1, (4000, 20)).min(1)
    assert 0.001 < draws.mean() < 0.05
    groups = ["a"] * 10 + ["b"] * 10
    wide = auc_interval(np.arange(20.0), np.arange(20.0) + 50, groups, groups)
    assert wide.low < 0.6


def test_one_author_has_no_interval() -> None:
    assert auc_interval(np.zeros(3), np.ones(3), ["a"] * 3, ["b", "c", "d"]) is None


def test_reference_attack_compares_with_the_reference_row_by_row() -> None:
    columns = {
        "forget": {"id": ["0", "1"], "mia_loss": [1.0, 2.0]},
        "holdout": {"id": ["0", "1"], "mia_loss": [1.5, 5.0]},
    }
    reference = {
        "forget": {"id": ["1", "0"], "mia_loss": [4.0, 2.0]},
        "holdout": {"id": ["0", "1"], "mia_loss": [2.5, None]},
    }
    # forget: 1 - 2 = -1 and 2 - 4 = -2; holdout: 1.5 - 2.5 = -1 and one not measured.
    found = AGGREGATES["mia_reference_auc"](columns, reference=reference)
    assert (found.value, found.n) == (0.75, 3)
    assert found.note == "1 of 4 rows not measured"
    absent = AGGREGATES["mia_reference_auc"](columns)
    assert (absent.value, absent.note) == (None, "no reference records given")
    reference["forget"]["id"] = ["1", "7"]
    assert (
        "other rows of 'forget'"
        in AGGREGATES["mia_reference_auc"](columns, reference=reference).note
    )
