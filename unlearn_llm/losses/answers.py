"""Forget losses that teach another answer beside unlearning the original: flat, llmu."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.errors import UserError
from unlearn_llm.objective import forget_loss
from unlearn_llm.types import Answer, Scored

Scores = Mapping[Answer, Scored]
Divergence = Literal["tv", "kl", "pearson", "js"]
# By f-divergence: g*(u), what a taught answer of mean probability u gains, and f*(g*(u)), what an
# answer to forget costs.
GAIN_AND_COST: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tv": (lambda u: u.tanh() / 2, lambda u: u.tanh() / 2),
    "kl": (lambda u: u, lambda u: (u - 1).exp()),
    "pearson": (lambda u: u, lambda u: u.square() / 4 + u),
    "js": (
        lambda u: F.logsigmoid(u) + math.log(2),
        lambda u: F.softplus(u) - math.log(2),
    ),
}


@forget_loss("flat", kind="targeted", per="sequence", answers=("idk", "original"))
def flat(policy: Scores, *, divergence: Divergence = "tv") -> Tensor:
    """Widen an f-divergence between a refusal and the answer: -g*(P_refusal) + f*(g*(P_answer)).

    P is the mean probability of an answer's tokens. Needs neither a reference nor retain data.

    Args:
        divergence: Total variation (tv), kl, pearson or js (Jensen-Shannon).

    Source: Wang et al. 2024 (FLAT), arXiv:2410.11143; the conjugates are those of f-GAN.
    Differs: P is a mean over the answer's tokens; the released code divides by all positions,
        prompt and padding included, which shrinks P by the share of the answer in the row.
    """
    if divergence not in GAIN_AND_COST:
        known = ", ".join(GAIN_AND_COST)
        raise UserError(f"flat: divergence: expected one of {known}, got {divergence!r}.")
    gain, cost = GAIN_AND_COST[divergence]
    return cost(_mean_probability(policy["original"])) - gain(_mean_probability(policy["idk"]))


@forget_loss("llmu", kind="untargeted", per="sequence", answers=("original", "random"))
def llmu(policy: Scores, *, ascent: float = 0.5) -> Tensor:
    """Learn another question's answer, and unlearn the own one: S/T of random - ascent * S/T.

    Source: Yao et al. 2023 (LLMU), arXiv:2310.10683; its third term is the retain loss `kl`.
    Differs: one random answer for each row, fixed by (seed, row) and from the retain set, where the
        authors draw five at every step from TruthfulQA.
    """
    original, random = policy["original"], policy["random"]
    return ascent * original.logp / original.length - random.logp / random.length


def _mean_probability(scored: Scored) -> Tensor:
    """(B,) mean over the answer's tokens."""
    return (scored.token_logps.exp() * scored.mask).sum(-1) / scored.length
