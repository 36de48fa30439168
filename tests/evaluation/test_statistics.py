"""Intervals and tests against scipy, closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from unlearn_llm.evaluation.statistics import (
    cluster_numbers,
    ks_interval,
    ks_p_value,
    percentile_interval,
    permutation_p_value,
    resamples,
    share_interval,
    summarise_seeds,
    wilcoxon_p_value,
)


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


def test_rows_alone_are_resampled_as_scipy_does() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=1
    ).confidence_interval
    draws = resamples(cluster_numbers(None, 80), 9999, np.random.default_rng(2))
    found = percentile_interval(np.array([values[rows].mean() for rows in draws]), 0.95)
    assert found == pytest.approx(tuple(expected), abs=0.02)


def test_clusters_are_drawn_whole() -> None:
    numbers = cluster_numbers(["a", "b", None, "a", None], 5)
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    for rows in resamples(numbers, 50, np.random.default_rng(0)):
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[3]  # the two rows of "a"
        assert counts[[0, 1, 2, 4]].sum() == 4  # four clusters drawn


def coverage(by_author: bool, runs: int = 200) -> float:
    """How often the interval of a mean holds the truth, 0; 20 authors of 10 alike rows."""
    authors = [str(author) for author in range(20) for _ in range(10)]
    numbers = cluster_numbers(authors if by_author else None, 200)
    held = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=20).repeat(10) + rng.normal(size=200)
        means = np.array([values[rows].mean() for rows in resamples(numbers, 200, rng)])
        low, high = percentile_interval(means, 0.95)
        held += low <= 0 <= high
    return held / runs


def test_an_interval_by_author_covers_and_one_by_row_does_not() -> None:
    assert coverage(by_author=True) >= 0.88  # percentile intervals of 20 are a little short
    assert coverage(by_author=False) < 0.65


def test_equal_resamples_give_no_interval() -> None:
    assert percentile_interval(np.zeros(100), 0.95) is None


def test_no_hits_are_no_certainty() -> None:
    low, high = share_interval(0, 20, 0.95)
    assert (low, high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))


def test_p_of_a_ks_distance_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for n, shift in ((40, 0.0), (40, 0.5), (300, 0.3), (400, 1.0)):
        first, second = rng.normal(size=n), rng.normal(shift, size=n)
        test = stats.ks_2samp(first, second)
        assert ks_p_value(test.statistic, n) == pytest.approx(test.pvalue, rel=1e-9)
    assert ks_p_value(0.0, 40) == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_interval_of_a_ks_distance_holds_it_and_the_truth(shift: float) -> None:
    truth = 2 * stats.norm.cdf(shift / 2) - 1
    held = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=100), rng.normal(shift, size=100)
        low, high = ks_interval(first, second, cluster_numbers(None, 100), 200, 0.95, rng)
        assert low <= stats.ks_2samp(first, second).statistic <= high
        held += low <= truth <= high
    assert held / 150 >= 0.93


def test_the_interval_of_a_ks_distance_counts_ties_once() -> None:
    first, second = np.array([0.0, 0, 1, 1, 1]), np.array([0.0, 0, 0, 1, 1])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        low, high = ks_interval(first, second, cluster_numbers(None, 5), 100, 0.9, rng)
        assert low <= 0.2 <= high
    same = ks_interval(first, first, cluster_numbers(None, 5), 100, 0.9, rng)
    assert same == pytest.approx((0.0, 0.0))  # resampled together, equal models stay equal


def test_permutation_p_is_the_share_of_all_sign_flips() -> None:
    differences = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 1.5])
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1).T
    permuted = (signs * differences).mean(1)
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert permutation_p_value(differences.mean(), permuted[1:]) == pytest.approx(exact)
    assert permutation_p_value(1.0, np.zeros(99)) == 0.01


def test_wilcoxon_is_scipys_on_the_means_of_authors() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.2, 1, 40)
    alone = cluster_numbers(None, 40)
    assert wilcoxon_p_value(differences, alone) == stats.wilcoxon(differences).pvalue
    authors = cluster_numbers([str(row // 4) for row in range(40)], 40)
    means = differences.reshape(10, 4).mean(1)
    assert wilcoxon_p_value(differences, authors) == stats.wilcoxon(means).pvalue
    gaps = np.where(np.arange(40) < 4, np.nan, differences)
    assert wilcoxon_p_value(gaps, authors) == stats.wilcoxon(means[1:]).pvalue
    assert wilcoxon_p_value(np.zeros(40), alone) == 1.0
