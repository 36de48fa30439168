"""The ROC curve of a membership attack, and the interval of the area under it.

The attack names as members the rows whose score is low. Forget rows are the positives; so the
area is `scores.mia_auc`, the probability that a holdout row scores above a forget row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from unlearn_llm.evaluation.scores import Array, Interval
from unlearn_llm.evaluation.statistics import check_confidence, cluster_numbers


class Roc(NamedTuple):
    """Points of the curve from (0, 0) to (1, 1), corners only."""

    fpr: Array
    """Share of the holdout rows that are named."""
    tpr: Array
    """Share of the forget rows that are named."""


def roc_curve(forget: Array, holdout: Array) -> Roc:
    """Walk the threshold from below all scores to above them.

    Args:
        forget, holdout: Membership scores, higher for less likely members.

    Source: sklearn.metrics.roc_curve of minus the scores, forget rows as positives. Differs: no
        difference.
    """
    thresholds = np.unique(np.concatenate([forget, holdout]))
    tpr, fpr = (
        np.append(0.0, np.searchsorted(np.sort(scores), thresholds, side="right") / len(scores))
        for scores in (forget, holdout)
    )
    # In counts, which are exact: is the curve straight at an inner point?
    bends = np.diff(np.rint(fpr * len(holdout)), 2) != 0
    bends |= np.diff(np.rint(tpr * len(forget)), 2) != 0
    corners = np.concatenate([[True], bends, [True]])
    return Roc(fpr[corners], tpr[corners])


def tpr_at(curve: Roc, fpr: float) -> float:
    """Greatest share of forget rows named where at most `fpr` of the holdout rows are."""
    return float(curve.tpr[curve.fpr <= fpr + 1e-12].max())


def auc_interval(
    forget: Array,
    holdout: Array,
    forget_groups: Sequence[str | None] | None = None,
    holdout_groups: Sequence[str | None] | None = None,
    confidence: float = 0.95,
) -> Interval | None:
    """Interval of the AUC: DeLong's variance, on the scale of the logit.

    The variance is summed over groups (authors), which count as one observation each; without
    groups it is DeLong's. On the logit scale the interval stays within 0 and 1. An AUC of
    exactly 0 or 1 has no variance; it gets the bound of Newcombe's method 5, with the numbers of
    groups in place of those of rows.

    Returns:
        None where a side has fewer than two groups.

    Source: DeLong et al. 1988; Obuchowski 1997 (groups); Newcombe 2006, doi:10.1002/sim.2324.
        Differs: groups lie wholly in one set, so the term between the sets is zero.
    """
    check_confidence(confidence)
    z = float(norm.ppf((1 + confidence) / 2))
    sides = [cluster_numbers(forget_groups, len(forget))]
    sides.append(cluster_numbers(holdout_groups, len(holdout)))
    sizes = [int(side.max()) + 1 for side in sides]
    if min(sizes) < 2:
        return None
    by = "author" if max(len(forget), len(holdout)) > max(sizes) else "row"
    # For each row, with which probability it is on the right side of one of the other set.
    placements = (1 - _share_below(forget, holdout), _share_below(holdout, forget))
    auc = float(placements[0].mean())
    if auc in (0.0, 1.0):
        bound = _newcombe_bound(sizes, z)
        low, high = (1 - bound, 1.0) if auc == 1 else (0.0, bound)
        return Interval(low, high, confidence, f"Newcombe by {by}")
    variance = 0.0
    for values, numbers, size in zip(placements, sides, sizes, strict=True):
        sums = np.bincount(numbers, weights=values - auc)
        variance += size / (size - 1) * float(np.sum(sums**2)) / len(values) ** 2
    half = z * math.sqrt(variance) / (auc * (1 - auc))
    logit = math.log(auc / (1 - auc))
    low, high = (1 / (1 + math.exp(-end)) for end in (logit - half, logit + half))
    return Interval(low, high, confidence, f"DeLong (logit) by {by}")


def _share_below(values: Array, others: Array) -> Array:
    """For each value the share of the others below it; equal ones count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values, side="left")
    return (below + np.searchsorted(ordered, values, side="right")) / 2 / len(others)


def _newcombe_bound(sizes: Sequence[int], z: float) -> float:
    """How far from 0 an area may be of which 0 was observed; by symmetry the same at 1."""
    m, n = sizes
    half = (m + n) / 2 - 1

    def excess(auc: float) -> float:
        spread = 1 + half * (1 - auc) / (2 - auc) + half * auc / (1 + auc)
        return auc**2 - z**2 * auc * (1 - auc) * spread / (m * n)

    return float(brentq(excess, 1e-12, 1.0))
