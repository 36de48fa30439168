"""Scores of membership attacks: rows -> one number per row, higher for less likely members.

An attack says "was trained on" where the score is low; aggregates.py compares the scores of the
forget set with those of a holdout set. The reference attack needs a second model's records, so it
is an aggregate (`mia_reference_auc`) of `mia_loss`.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

from unlearn_llm.evaluation.likelihoods import Column, asks_answer, finite, loss_of, scored
from unlearn_llm.evaluation.requests import (
    GradientNorm,
    GradientNormResult,
    Request,
    Row,
    Sample,
    TokenMoments,
    TokenMomentsResult,
    metric,
)

MIN_K = 0.4
"""The share of least likely tokens that the min-k scores look at."""
LEAST_VARIANCE = 1e-6
"""Below it a distribution counts as this wide: at a certain token min-k++ would divide by 0."""


def _asks_moments(sample: Sample) -> Mapping[str, Request]:
    if not sample.answer.strip():
        return {}
    return {"moments": TokenMoments(sample.question, sample.answer)}


def _asks_gradient(sample: Sample) -> Mapping[str, Request]:
    if not sample.answer.strip():
        return {}
    return {"gradient": GradientNorm(sample.question, sample.answer)}


@metric("mia_loss", asks=asks_answer)
def mia_loss(rows: Sequence[Row]) -> Column:
    """Membership score: the loss per token. Higher is less likely a member, as in all of these.

    Source: locuslab/open-unlearning@d3d7cf9 mia_loss. Differs: no difference.
    """
    losses = [loss_of(row, "answer") for row in rows]
    return [None if loss is None else finite(loss) for loss in losses]


@metric("mia_zlib", asks=asks_answer)
def mia_zlib(rows: Sequence[Row]) -> Column:
    """Membership score: the loss per token over the compressed size of the answer in bytes.

    Source: locuslab/open-unlearning@d3d7cf9 mia_zlib. Differs: compresses the answer as given;
        the source decodes its tokens again.
    """
    return [
        None if loss is None else loss / _zlib_bytes(row.sample.answer)
        for row, loss in zip(rows, mia_loss.compute(rows), strict=True)
    ]


def _zlib_bytes(text: str) -> int:
    # A lone surrogate in scraped text must not end an evaluation.
    return len(zlib.compress(text.encode("utf-8", "surrogatepass")))


@metric("mia_min_k", asks=asks_answer)
def mia_min_k(rows: Sequence[Row]) -> Column:
    """Membership score: minus the mean log-probability of the 40% least likely tokens.

    Without the last scored position (the end token); 0 where nothing else is scored.

    Source: locuslab/open-unlearning@d3d7cf9 mia_min_k, k = 0.4. Differs: no difference. MUSE's
        own code scores whole texts.
    """
    results = [scored(row, "answer") for row in rows]
    return [None if each is None else finite(_min_k(each.token_logps[:-1])) for each in results]


@metric("mia_min_k_plus_plus", asks=_asks_moments)
def mia_min_k_plus_plus(rows: Sequence[Row]) -> Column:
    """Membership score: min-k of the log-probabilities in standard deviations from the expected.

    Each token counts (log p - E[log p]) / std[log p], over the distribution that the model has
    at its place. Without the last scored position; 0 where nothing else is scored.

    Source: min-k%++, arXiv:2404.02936; locuslab/open-unlearning@f4d8463 min_k_plus_plus.py,
        k = 0.4. Differs: the variance is taken around the mean; the source's difference of two
        squares loses digits.
    """
    results = [row.results.get("moments") for row in rows]
    return [
        finite(_min_k(_standardised(result)[:-1]))
        if isinstance(result, TokenMomentsResult) and result.token_logps
        else None
        for result in results
    ]


def _standardised(result: TokenMomentsResult) -> list[float]:
    tokens = zip(result.token_logps, result.means, result.variances, strict=True)
    return [
        (logp - mean) / math.sqrt(max(variance, LEAST_VARIANCE)) for logp, mean, variance in tokens
    ]


@metric("mia_gradnorm", asks=_asks_gradient)
def mia_gradnorm(rows: Sequence[Row]) -> Column:
    """Membership score: mean over the weight tensors of the 2-norm of the loss's gradient.

    Source: locuslab/open-unlearning@d3d7cf9 mia_gradnorm, p = 2. Differs: dropout is off, so
        that the score is a function of the row; the source switches to train(). For a model with
        adapters the gradient is that of the weights below them, as if they were merged.
    """
    results = [row.results.get("gradient") for row in rows]
    return [finite(r.norm) if isinstance(r, GradientNormResult) else None for r in results]


def _min_k(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    lowest = sorted(values)[: max(1, int(MIN_K * len(values)))]
    return -sum(lowest) / len(lowest)
