"""How sure a number is: intervals over rows, authors and seeds, and tests between two runs.

Pure: numpy and scipy. Which scores of a suite get an interval is intervals.py's business.
Rows of one author are no independent observations: what is resampled, or swapped between two
runs, are *clusters* of rows, numbered by `cluster_numbers`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from unlearn_llm.evaluation.scores import Array


class SeedSummary(NamedTuple):
    """Several runs of one setting that differ in their seed."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1 below); None for a single seed."""
    low: float | None
    high: float | None
    """Ends of the t interval of the mean; None for a single seed."""
    n: int


def summarise_seeds(values: Sequence[float], confidence: float = 0.95) -> SeedSummary:
    """Mean of several seeds with the spread between them and the t interval of the mean.

    Args:
        values: One score per seed.
        confidence: Share of such intervals that hold the mean over all seeds.

    Raises:
        ValueError: no values, one that is not finite, or a confidence that is no share.

    Source: Student's t interval, scipy.stats.t. Differs: no difference. pandas' and DualOptim's
        std (parse_output.py, ddof 1) is this one.
    """
    check_confidence(confidence)
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"Expected one finite number per seed, got {list(values)}.")
    n = int(array.size)
    mean = float(array.mean())
    if n == 1:
        return SeedSummary(mean, None, None, None, 1)
    std = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / n**0.5
    return SeedSummary(mean, std, mean - half, mean + half, n)


def cluster_numbers(groups: Sequence[str | None] | None, rows: int) -> NDArray[np.intp]:
    """Number the clusters of rows, 0, 1, ...: rows of one group share one, others stand alone.

    Args:
        groups: A name per row, or None; None in place of the list: every row stands alone.
        rows: How many rows there are.
    """
    if groups is None:
        return np.arange(rows)
    keys = [("row", str(row)) if g is None else ("group", g) for row, g in enumerate(groups)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.intp)


def resamples(
    numbers: NDArray[np.intp], count: int, rng: np.random.Generator
) -> Iterator[NDArray[np.intp]]:
    """Draw as many clusters as there are, with replacement, `count` times; yield their rows.

    Args:
        numbers: (n,) the cluster of each row.

    Source: the cluster bootstrap, Davison and Hinkley 1997, 3.8. Differs: no difference; with
        rows that stand alone it is the ordinary bootstrap.
    """
    order = np.argsort(numbers, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(numbers))[:-1])
    alone = len(members) == len(numbers)
    for _ in range(count):
        drawn = rng.integers(len(members), size=len(members))
        yield order[drawn] if alone else np.concatenate([members[each] for each in drawn])


def percentile_interval(values: Array, confidence: float) -> tuple[float, float] | None:
    """Give the middle share of resampled values; None where all are alike, which is no certainty.

    Source: Efron's percentile interval. Differs: no difference.
    """
    check_confidence(confidence)
    if np.ptp(values) == 0:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_interval(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Give the exact interval of a share, which 0 of n hits do not make certain either.

    Source: Clopper and Pearson 1934, scipy.stats.binomtest. Differs: no difference.
    """
    found = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def ks_interval(
    first: Array,
    second: Array,
    numbers: NDArray[np.intp],
    count: int,
    confidence: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Interval of the KS distance of two models on the same rows.

    The bootstrap of the distance itself is too large near 0: resampled rows are never alike. But
    the difference of the two distribution functions is within c of the true one, everywhere, as
    often as resampled ones are within c of it; so the distance is, too.

    Args:
        first, second: (n,) the values of the same rows.
        numbers: (n,) the cluster of each row.

    Source: bootstrap bands of distribution functions, Bickel and Freedman 1981. Differs: rows
        are drawn in clusters and for both models together; conservative, since a band is wider
        than its greatest gap needs.
    """
    check_confidence(confidence)
    clusters = int(numbers.max()) + 1
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=count)[:, numbers]
    counts = np.concatenate([np.ones((1, len(numbers))), drawn])  # the first one: as observed
    weights = counts / counts.sum(axis=1, keepdims=True)
    pooled = np.concatenate([first, second])
    order = np.argsort(pooled, kind="stable")
    last_of_ties = np.append(np.diff(pooled[order]) > 0, True)
    signed = np.concatenate([weights, -weights], axis=1)[:, order]
    gaps = np.cumsum(signed, axis=1)[:, last_of_ties]
    distance = float(np.abs(gaps[0]).max())
    band = float(np.quantile(np.abs(gaps[1:] - gaps[0]).max(axis=1), confidence))
    return max(0.0, distance - band), min(1.0, distance + band)


def ks_p_value(distance: float, n: int) -> float:
    """P-value of the two-sided exact KS test of n and n values at such a distance.

    Source: scipy.stats.ks_2samp, on two samples made to have the distance. Differs: a distance
        between two possible ones counts as the greater.
    """
    gap = int(np.ceil(distance * n - 1e-9))
    if gap <= 0:
        return 1.0
    ranks = np.arange(n, dtype=np.float64)
    return float(stats.ks_2samp(ranks, ranks + gap - 0.5).pvalue)


def permutation_p_value(observed: float, permuted: Array) -> float:
    """Two-sided p-value: how often chance alone makes a difference as large as the observed.

    Source: Phipson and Smyth 2010: the observed one counts as one of the permutations, so p is
        never 0. Differs: no difference.
    """
    # Sums in another order must count as equal.
    extreme = np.abs(permuted) >= abs(observed) * (1 - 1e-9) - 1e-15
    return float((1 + extreme.sum()) / (1 + len(permuted)))


def wilcoxon_p_value(differences: Array, numbers: NDArray[np.intp]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test on the means of the clusters.

    Args:
        differences: (n,) of the two models' values of each row; NaN: not measured in one.
        numbers: (n,) the cluster of each row.

    Source: scipy.stats.wilcoxon. Differs: clusters in place of rows; 1 where nothing differs.
    """
    known = ~np.isnan(differences)
    counts = np.bincount(numbers[known])
    sums = np.bincount(numbers[known], weights=differences[known])
    means = sums[counts > 0] / counts[counts > 0]
    means[np.abs(means) < 1e-15] = 0.0
    return float(stats.wilcoxon(means).pvalue) if np.any(means) else 1.0


def check_confidence(confidence: float) -> None:
    """Refuse what is no share between 0 and 1.

    Raises:
        ValueError: naming it.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence between 0 and 1, such as 0.95, got {confidence}.")
