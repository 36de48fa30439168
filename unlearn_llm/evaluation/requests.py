"""What a metric may ask of a model, what it gets back, and the row it sees. Words only.

Their representations, which end in messages and logs, show no texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unlearn_llm.registry import Registry


@dataclass(frozen=True)
class LogProb:
    """How likely is this answer to this question? The answer's tokens and one end token count."""

    question: str = field(repr=False)
    answer: str = field(repr=False)


@dataclass(frozen=True)
class Generate:
    """What does the model answer to this question, greedily?"""

    question: str = field(repr=False)
    max_new_tokens: int | None = None
    """Where it is cut; None: at the evaluation's own limit, which is the greatest in any case."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which it is cut."""


@dataclass(frozen=True)
class TokenMoments:
    """How likely is each token of the answer, and what would the model have expected there?"""

    question: str = field(repr=False)
    answer: str = field(repr=False)


@dataclass(frozen=True)
class GradientNorm:
    """How strongly would one row change the weights?"""

    question: str = field(repr=False)
    answer: str = field(repr=False)


Request = LogProb | Generate | TokenMoments | GradientNorm


@dataclass(frozen=True)
class LogProbResult:
    """The answer to a LogProb request."""

    token_logps: tuple[float, ...]
    """Nats per scored token, in order; the end token is the last."""
    greedy: tuple[bool, ...]
    """For each scored token: is it the model's own first choice (teacher-forced argmax)?"""

    @property
    def loss(self) -> float:
        """Mean negative log-probability per token, in nats; inf for an answer without tokens."""
        if not self.token_logps:
            return float("inf")
        return -sum(self.token_logps) / len(self.token_logps)


@dataclass(frozen=True)
class Generation:
    """The answer to a Generate request."""

    text: str = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    """`tokenizer.tokenize(text)`: what token entropy counts."""
    finished: bool
    """Did the model end by itself, or was it cut at the limit?"""


@dataclass(frozen=True)
class TokenMomentsResult:
    """The answer to a TokenMoments request; per scored token, the end token is the last."""

    token_logps: tuple[float, ...]
    """Nats."""
    means: tuple[float, ...]
    """Expected log-probability of a token drawn from the model, E_p[log p]: minus the entropy."""
    variances: tuple[float, ...]
    """Variance of the same, Var_p[log p], in nats squared."""


@dataclass(frozen=True)
class GradientNormResult:
    """The answer to a GradientNorm request."""

    norm: float
    """Mean over the weight tensors of the 2-norm of the gradient of the loss per token."""


Result = LogProbResult | Generation | TokenMomentsResult | GradientNormResult


@dataclass(frozen=True)
class Sample:
    """One row of a probe's data, as the metrics see it."""

    id: str
    """Stable name of the row: its number in the source file."""
    question: str = field(repr=False)
    answer: str = field(repr=False)
    """What probability, ROUGE and the ROUGE gate compare with."""
    paraphrased: str | None = field(default=None, repr=False)
    """The right answer of the truth ratio (the plain answer where the data has no paraphrase)."""
    perturbed: tuple[str, ...] = field(default=(), repr=False)
    """The wrong answers of the truth ratio."""
    reference: str | None = field(default=None, repr=False)
    """What similarity and entailment compare with; None: the answer."""
    refusal: str | None = field(default=None, repr=False)
    """The refusal line of this row, fixed by (seed, row), for refusal entailment."""
    similar_to: str | None = field(default=None, repr=False)
    """What similarity compares with where that is a third text (the long answer of the
    real-person data); None: the reference."""
    max_new_tokens: int | None = None
    """Where the answer to this question is cut; None: where all are."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which it is cut."""
    group: str | None = field(default=None, repr=False)
    """Rows of one author or person share it, since what happens to one happens to all."""


@dataclass(frozen=True)
class Row:
    """A sample with the results that a metric asked for, under the metric's own keys."""

    sample: Sample
    results: Mapping[str, Result] = field(default_factory=dict)


class Judge(Protocol):
    """Another model that reads texts. Its name stands in the name of every score it gives."""

    name: str

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Judge (text, other text) pairs; a label or a number for each."""
        ...


@dataclass(frozen=True)
class Metric:
    """One number per row, from what the model answered.

    Attributes:
        asks: sample -> {key: request}. Requests that several metrics share are asked once.
        compute: rows -> one number (or None: does not apply) per row; with `judge`,
            (rows, judge) -> the same.
        judge: The kind of judge needed ("entailment", "similarity"), or None.
    """

    name: str
    asks: Callable[[Sample], Mapping[str, Request]]
    compute: Callable[..., list[float | None]]
    judge: str | None = None


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str, *, asks: Callable[[Sample], Mapping[str, Request]], judge: str | None = None
) -> Callable[[Callable[..., list[float | None]]], Metric]:
    """Register the decorated function as the metric `name`."""

    def register(compute: Callable[..., list[float | None]]) -> Metric:
        return METRICS.add(name, Metric(name, asks, compute, judge))

    return register
