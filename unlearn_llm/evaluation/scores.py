"""Scores of single columns: numbers per row -> one number, or the reason why there is none.

Pure. A None in a column is a row that could not be measured: it is skipped and counted in the
note. aggregates.py names these, and the composites of several columns, for suites.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp, rankdata

OPEN_UNLEARNING_EPS = 1e-10

Array = NDArray[np.float64]
Values = Sequence[float | None] | Array
"""Numbers of rows; None, or in an array NaN, where a row could not be measured."""


@dataclass(frozen=True)
class Interval:
    """Between which bounds a score would fall had other rows of the same kind been asked.

    Attributes:
        confidence: Share of such intervals that hold the true value.
        method: How it was made, and whether over rows or over authors.
    """

    low: float
    high: float
    confidence: float
    method: str


@dataclass(frozen=True)
class Score:
    """One number made from records.

    Attributes:
        value: The number; None means "not measured", never 0.
        n: How many rows made it; None for a composite of several columns.
        note: Why there is no value, or what a reader must know about it.
        interval: How sure it is; None: not measured.
    """

    value: float | None
    n: int | None = None
    note: str | None = None
    interval: Interval | None = None

    @classmethod
    def missing(cls, reason: str) -> "Score":
        """Make the score that says why nothing was measured."""
        return cls(None, None, reason)


def mean(values: Values) -> Score:
    """Arithmetic mean over rows.

    Source: TOFU, locuslab/tofu@bdc209e. Differs: no difference.
    """
    return _reduce(values, lambda array: array.mean())


def maximum(values: Values) -> Score:
    """Greatest value: the row that leaks most, which a mean hides.

    Source: this package. Differs: not in the papers.
    """
    return _reduce(values, lambda array: np.max(array))


def fraction(values: Values, *, at_least: float = 0.5) -> Score:
    """Share of rows whose value is `at_least` so great.

    Source: this package. Differs: not in the papers.
    """
    return _reduce(values, lambda array: np.mean(array >= at_least))


def truth_ratio_nonforget(values: Values) -> Score:
    """Mean of max(0, 1 - r): how much the truth is preferred. Up is knowing.

    Source: TOFU, locuslab/tofu@bdc209e aggregate_eval_stat.py (all but the forget set).
        Differs: no difference.
    """
    return _reduce(values, lambda ratio: np.mean(np.maximum(0.0, 1.0 - ratio)))


def truth_ratio_forget(values: Values, *, eps: float = 0.0) -> Score:
    """Mean of min(r, 1/r): 1 is indifference between truth and falsehood.

    `eps` is added to r in 1/r; it is 1e-10 in open-unlearning, on `truth_ratio_eps`.

    Source: TOFU, locuslab/tofu@bdc209e; open-unlearning@d3d7cf9. Differs: no difference; 0 for
        r = 0.
    """
    return _reduce(values, lambda ratio: np.mean(_indifference(ratio, eps)))


def truth_ratio_forget_ufe(values: Values) -> Score:
    """One minus the mean of min(r, 1/r): lower is better forgotten, as in a mean of leaks.

    Source: closer-look@b622294 and DualOptim+@b370724 get_eval_results (forget set). Differs: no
        difference. TOFU reports `truth_ratio_forget` under the same name.
    """
    return _reduce(values, lambda ratio: 1.0 - np.mean(_indifference(ratio, 0.0)))


def truth_ratio_share(values: Values) -> Score:
    """Mean of 1 / (1 + r): the probability of the right among right and (mean) wrong.

    Source: open-unlearning@d3d7cf9 prob_mean. Differs: theirs adds 1e-10 to the denominator.
    """
    return _reduce(values, lambda ratio: np.mean(1.0 / (1.0 + ratio)))


def _indifference(ratio: Array, eps: float) -> Array:
    with np.errstate(divide="ignore", over="ignore"):  # 1/0 is inf, and the minimum is r = 0
        return np.minimum(ratio, 1.0 / (ratio + eps))


def harmonic_mean(members: Mapping[str, Score]) -> Score:
    """Harmonic mean of scores; 0 if any of them is 0, not measured if any is not.

    Source: scipy.stats.hmean. Differs: no difference; a negative member is refused.
    """

    def compute(values: Sequence[float]) -> float:
        if min(values) < 0:
            return math.nan
        return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)

    return combine(members, compute)


def combine(members: Mapping[str, Score], compute: Callable[[Sequence[float]], float]) -> Score:
    """Make one score of several; the note of a missing one names every member it lacks."""
    values = [score.value for score in members.values() if score.value is not None]
    if len(values) < len(members):
        lacking = (f"{name} ({s.note})" for name, s in members.items() if s.value is None)
        return Score.missing(f"needs {'; '.join(lacking)}")
    value = float(compute(values))
    if not math.isfinite(value):
        shown = ", ".join(f"{name} {score.value:g}" for name, score in members.items())
        return Score.missing(f"cannot be made of {shown}")
    notes = [f"{name}: {score.note}" for name, score in members.items() if score.note]
    return Score(value, None, "; ".join(notes) or None)


def forget_quality(
    values: Mapping[str, float | None], reference: Mapping[str, float | None]
) -> Score:
    """P-value of the two-sided two-sample KS test of truth ratios against the reference's.

    The reference is a model that never saw the forget set. Near 1: cannot be told apart.

    Args:
        values: Raw truth ratio by row id; r or 1/r, the test does not change.
        reference: The same rows of the reference model.

    Source: TOFU, locuslab/tofu@bdc209e; scipy ks_2samp, exact up to n = 10000. Differs: rows are
        matched by id and other rows are refused; theirs pairs by order. p is not comparable
        across n.
    """
    return _ks(values, reference, lambda first, second: ks_2samp(first, second).pvalue)


def ks_statistic(
    values: Mapping[str, float | None], reference: Mapping[str, float | None]
) -> Score:
    """Distance D of the same test: the greatest gap of the two distribution functions.

    Source: the D of scipy ks_2samp. Differs: as `forget_quality`.
    """
    return _ks(values, reference, _greatest_gap)


def _greatest_gap(first: Sequence[float], second: Sequence[float]) -> float:
    # scipy would compute the p-value, too, which takes a hundred times as long.
    pooled = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(s), pooled, side="right") / len(s) for s in (first, second)]
    return float(np.max(np.abs(shares[0] - shares[1])))


def _ks(
    values: Mapping[str, float | None],
    reference: Mapping[str, float | None],
    compute: Callable[[list[float], list[float]], float],
) -> Score:
    if values.keys() != reference.keys():
        differing = len(values.keys() ^ reference.keys())
        return Score.missing(
            f"the reference has other rows: {len(values)} here, {len(reference)} there, "
            f"{differing} in one of them only"
        )
    pairs = [(value, reference[row]) for row, value in values.items()]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not kept:
        return Score.missing("no row measured in both")
    first, second = [a for a, _ in kept], [b for _, b in kept]
    if any(math.isnan(number) for number in (*first, *second)):
        return Score.missing("some values are not numbers")
    return Score(float(compute(first, second)), len(kept), _skipped(len(pairs), len(kept)))


def mia_auc(forget: Values, holdout: Values) -> Score:
    """Probability that a holdout row scores above a forget row; ties count half.

    The scores are higher for less likely members, so 1 is "the forget set is clearly memorised"
    and 0.5 is "cannot be told apart".

    Source: locuslab/open-unlearning@d3d7cf9 (roc_auc, forget 0, holdout 1). Differs: no
        difference. MUSE's own AUC is one minus this.
    """
    inside, outside = measured(forget), measured(holdout)
    if not len(inside) or not len(outside):
        return Score.missing(f"{len(inside)} forget and {len(outside)} holdout rows measured")
    if np.isnan(inside).any() or np.isnan(outside).any():
        return Score.missing("some values are not numbers")
    ranks = rankdata([*outside, *inside])[: len(outside)]
    wins = float(np.sum(ranks)) - len(outside) * (len(outside) + 1) / 2
    n = len(inside) + len(outside)
    note = _skipped(len(forget) + len(holdout), n)
    return Score(wins / (len(inside) * len(outside)), n, note)


def privleak(auc: float, reference_auc: float) -> float:
    """Leakage in percent of the reference's: 0 is ideal, -100 fully leaking.

    Args:
        auc: `mia_auc` of min-k scores.
        reference_auc: The same of a model that never saw the forget set.

    Source: locuslab/open-unlearning@d3d7cf9, with its 1e-10. Differs: no default reference
        (theirs falls back to 0.5). MUSE's own constants are News 1 - .4772, Books 1 - .5393.
    """
    return 100 * (reference_auc - auc) / (1 - reference_auc + OPEN_UNLEARNING_EPS)


def measured(values: Values) -> Array:
    """Give the values of the rows that were measured."""
    if isinstance(values, np.ndarray):
        return values[~np.isnan(values)]
    return np.asarray([value for value in values if value is not None], dtype=np.float64)


def _reduce(values: Values, compute: Callable[[Array], float | np.floating]) -> Score:
    kept = measured(values)
    if not len(kept):
        return Score.missing(f"0 of {len(values)} rows measured")
    value = float(compute(kept))
    if not math.isfinite(value):
        return Score.missing(f"{np.sum(~np.isfinite(kept))} values are not finite")
    return Score(value, len(kept), _skipped(len(values), len(kept)))


def _skipped(total: int, kept: int) -> str | None:
    return f"{total - kept} of {total} rows not measured" if kept < total else None
