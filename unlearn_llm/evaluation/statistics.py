"""How sure a number is: intervals over rows, authors and seeds, and tests between two runs.

Pure: numpy and scipy. Which scores of a suite get an interval is intervals.py's business.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


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


def check_confidence(confidence: float) -> None:
    """Refuse what is no share between 0 and 1.

    Raises:
        ValueError: naming it.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence between 0 and 1, such as 0.95, got {confidence}.")
