"""What is read off the distributions at an answer's tokens, by the kind of request."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_llm.evaluation.requests import (
    LogProb,
    LogProbResult,
    Result,
    TokenMoments,
    TokenMomentsResult,
)


class Reading(NamedTuple):
    """How one kind of request is answered from log-probabilities."""

    what: str
    """What a progress bar calls it."""
    of_tokens: Callable[[Tensor, Tensor], Tensor]
    """(N, V) log-probabilities and (N,) tokens that came next -> (N, k) numbers."""
    result: Callable[[Tensor], Result]
    """The (n, k) numbers of one row -> the answer to its request."""


def logp_and_greedy(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, and 1 where it is the first choice: (N, 2)."""
    chosen = _of_targets(logps, targets)
    # Not argmax, which takes twice as long on a CPU.
    return torch.stack([chosen, (logps.max(-1).indices == targets).to(chosen.dtype)], dim=-1)


def logp_and_moments(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, mean and variance of log p over the vocabulary: (N, 3)."""
    p = logps.exp()
    known = logps.masked_fill(p == 0, 0.0)  # 0 log 0 is 0, where log 0 alone is infinite
    mean = (p * known).sum(-1)
    variance = (p * (known - mean[:, None]).square()).sum(-1)
    return torch.stack([_of_targets(logps, targets), mean, variance], dim=-1)


def _of_targets(logps: Tensor, targets: Tensor) -> Tensor:
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def _log_prob(values: Tensor) -> LogProbResult:
    return LogProbResult(tuple(values[:, 0].tolist()), tuple(values[:, 1].bool().tolist()))


def _moments(values: Tensor) -> TokenMomentsResult:
    logps, means, variances = (tuple(column.tolist()) for column in values.unbind(-1))
    return TokenMomentsResult(logps, means, variances)


READINGS: dict[type[LogProb] | type[TokenMoments], Reading] = {
    LogProb: Reading("scoring", logp_and_greedy, _log_prob),
    TokenMoments: Reading("moments", logp_and_moments, _moments),
}
