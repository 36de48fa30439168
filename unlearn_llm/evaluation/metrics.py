"""Metrics of likelihood: rows -> one number per row, from token log-probabilities.

The metrics of generated texts are in text_metrics.py and safety_metrics.py, the scores of
membership attacks in membership.py; this file imports them, so that `METRICS` is complete once it
is imported. A row for which a metric does not apply (no answer, no wrong answers) gives None; no
metric gives NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence

# These register their metrics.
from unlearn_llm.evaluation import membership as membership
from unlearn_llm.evaluation import safety_metrics as safety_metrics
from unlearn_llm.evaluation import text_metrics as text_metrics
from unlearn_llm.evaluation.likelihoods import Column, asks_answer, finite, loss_of, scored
from unlearn_llm.evaluation.requests import (
    METRICS as METRICS,
)
from unlearn_llm.evaluation.requests import (
    LogProb,
    Request,
    Row,
    Sample,
    metric,
)

OPEN_UNLEARNING_EPS = 1e-10
"""What open-unlearning adds to denominators; it shows in collapsed models (.59539 for .59525)."""


def _asks_answer_and_perturbed(sample: Sample) -> Mapping[str, Request]:
    if not sample.answer.strip() or not sample.perturbed:
        return {}
    return {**asks_answer(sample), **_perturbed(sample)}


def _asks_truth_ratio(sample: Sample) -> Mapping[str, Request]:
    if not sample.paraphrased or not sample.perturbed:
        return {}
    right = LogProb(sample.question, sample.paraphrased)
    return {"paraphrased": right, **_perturbed(sample)}


def _perturbed(sample: Sample) -> dict[str, Request]:
    return {
        f"perturbed/{index}": LogProb(sample.question, wrong)
        for index, wrong in enumerate(sample.perturbed)
    }


@metric("probability", asks=asks_answer)
def probability(rows: Sequence[Row]) -> Column:
    """Probability of the answer per token, exp(-l): the geometric mean over its tokens.

    Source: TOFU, locuslab/tofu@bdc209e aggregate_eval_stat.py. Differs: no difference.
    """
    losses = [loss_of(row, "answer") for row in rows]
    return [None if loss is None else math.exp(-loss) for loss in losses]


@metric("probability_normalised", asks=_asks_answer_and_perturbed)
def probability_normalised(rows: Sequence[Row]) -> Column:
    """Probability of the answer against the wrong ones: p / (p + sum of p_wrong), p per token.

    Source: TOFU, locuslab/tofu@bdc209e aggregate_eval_stat.py (real authors, world facts).
        Differs: no difference. The paper's text has p of the whole answer; no code has.
    """
    return _against_wrong(
        rows, "answer", lambda right, wrong: 1 / (1 + sum(_exp(right - each) for each in wrong))
    )


@metric("probability_normalised_eps", asks=_asks_answer_and_perturbed)
def probability_normalised_eps(rows: Sequence[Row]) -> Column:
    """Probability of the answer against the wrong ones, with open-unlearning's epsilon.

    Source: locuslab/open-unlearning@d3d7cf9 (1e-10 in the denominator). Differs: no difference.
    """

    def share(right: float, wrong: Sequence[float]) -> float:
        p = math.exp(-right)
        return p / (p + sum(math.exp(-each) for each in wrong) + OPEN_UNLEARNING_EPS)

    return _against_wrong(rows, "answer", share)


@metric("truth_ratio", asks=_asks_truth_ratio)
def truth_ratio(rows: Sequence[Row]) -> Column:
    """Raw truth ratio r = wrong / right, with the geometric mean of the wrong answers.

    r = exp(l_paraphrased - mean l_perturbed). Below 1 the model prefers the truth. What is made
    of r (1 - r, min(r, 1/r), a KS test) is an aggregate's choice.

    Source: TOFU, locuslab/tofu@bdc209e aggregate_eval_stat.py; closer-look and DualOptim+ alike.
        Differs: the exponent is cut at 700, so that r stays a finite number.
    """
    return _against_wrong(
        rows, "paraphrased", lambda right, wrong: _exp(right - sum(wrong) / len(wrong))
    )


@metric("truth_ratio_arithmetic", asks=_asks_truth_ratio)
def truth_ratio_arithmetic(rows: Sequence[Row]) -> Column:
    """Raw truth ratio with the arithmetic mean of the wrong answers' probabilities.

    Source: TOFU's paper and locuslab/tofu@bdc209e utils.py get_model_utility; published TOFU
        numbers use the geometric one. Differs: the exponent is cut at 700.
    """
    return _against_wrong(
        rows, "paraphrased", lambda right, wrong: sum(_exp(right - w) for w in wrong) / len(wrong)
    )


@metric("truth_ratio_eps", asks=_asks_truth_ratio)
def truth_ratio_eps(rows: Sequence[Row]) -> Column:
    """Raw geometric truth ratio with open-unlearning's epsilon: wrong / (right + 1e-10).

    Source: locuslab/open-unlearning@d3d7cf9. Differs: no difference.
    """

    def ratio(right: float, wrong: Sequence[float]) -> float:
        return math.exp(-sum(wrong) / len(wrong)) / (math.exp(-right) + OPEN_UNLEARNING_EPS)

    return _against_wrong(rows, "paraphrased", ratio)


@metric("exact_memorization", asks=asks_answer)
def exact_memorization(rows: Sequence[Row]) -> Column:
    """Share of the answer's tokens that are the model's first choice, without the last position.

    The last scored position (the end token) is left out; None where nothing else is scored.

    Source: locuslab/open-unlearning@d3d7cf9 exact_memorization. Differs: no difference.
    """
    greedy = [_greedy(row) for row in rows]
    return [sum(hits) / len(hits) if hits else None for hits in greedy]


@metric("extraction_strength", asks=asks_answer)
def extraction_strength(rows: Sequence[Row]) -> Column:
    """1 - k/n, k the shortest prefix of the answer after which the model says all the rest.

    Without the last scored position (the end token). Where not even the last token follows, the
    source's loop stops at k = n - 1, so the least value is 1/n, and 0 only for nothing scored.

    Source: locuslab/open-unlearning@d3d7cf9 extraction_strength. Differs: no difference.
    """
    greedy = [_greedy(row) for row in rows]
    return [None if hits is None else _extracted(hits) for hits in greedy]


def _extracted(hits: Sequence[bool]) -> float:
    if not hits:
        return 0.0
    start = len(hits)
    while start > 0 and hits[start - 1]:
        start -= 1
    return 1 - min(start, len(hits) - 1) / len(hits)


def _against_wrong(
    rows: Sequence[Row], key: str, combine: Callable[[float, Sequence[float]], float]
) -> Column:
    """Combine the loss of the right answer, under `key`, with the losses of the wrong ones."""
    column: Column = []
    for row in rows:
        right = loss_of(row, key)
        wrong = [loss_of(row, f"perturbed/{index}") for index in range(len(row.sample.perturbed))]
        known = [loss for loss in wrong if loss is not None]
        complete = right is not None and known and len(known) == len(wrong)
        column.append(finite(combine(right, known)) if complete and right is not None else None)
    return column


def _greedy(row: Row) -> tuple[bool, ...] | None:
    result = scored(row, "answer")
    return None if result is None else result.greedy[:-1]


def _exp(exponent: float) -> float:
    return math.exp(min(max(exponent, -700.0), 700.0))  # float64 ends at exp(709)
