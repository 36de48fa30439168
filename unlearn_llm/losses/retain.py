"""Retain losses. Each takes scored sequences and returns one number per sequence, minimised."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.objective import retain_loss
from unlearn_llm.types import Answer, Scored

Scores = Mapping[Answer, Scored]


@retain_loss("gd", per="token")
def gd(policy: Scores) -> Tensor:
    """Gradient descent: the token mean of the answer's negative log-likelihood.

    Source: Maini et al. 2024 (TOFU), "grad_diff".
    Differs: the token mean is taken over the whole window, not per micro-batch.
    """
    return -policy["original"].logp


@retain_loss("kl", per="token", positions="attended", reference="distribution")
def kl(policy: Scores, reference: Scores) -> Tensor:
    """Stay near the reference: KL(reference || model) at every real token, token mean.

    Source: Maini et al. 2024 (TOFU), dataloader.py "KL".
    Differs: averaged over real tokens; the authors' batchmean also counts padding (to 500), which
        dilutes it five- to tenfold.
    """
    return _divergence(policy, reference)


@retain_loss("gd_kl", per="token", reference="distribution")
def gd_kl(policy: Scores, reference: Scores, *, alpha: float = 0.5, gamma: float = 1.0) -> Tensor:
    """Gradient descent and distillation: gamma S + alpha KL(reference || model), token mean.

    The retain loss of `scrub`. Both are taken at the answer's positions, `kl` at every real token.

    Source: Kurmanji et al. 2023 (SCRUB), arXiv:2302.09880; meghdadk/SCRUB helper/loops.py, where
        alpha is called beta.
    Differs: as `scrub`.
    """
    return alpha * _divergence(policy, reference) - gamma * policy["original"].logp


@retain_loss("ap", per="sequence", answers=("original", "idk"))
def ap(policy: Scores, *, beta: float = 0.1) -> Tensor:
    """Answer preservation: keep the answer likelier than a refusal, on retain questions.

    -(1/beta) log sigmoid(beta * (S_refusal - S_answer)), sequence sums, no reference.

    Source: Yuan et al. 2024 (closer look), losses.get_ap_loss.
    Differs: no difference; the factor is 1/beta, not 2/beta.
    """
    margin = policy["original"].logp - policy["idk"].logp
    return -1 / beta * F.logsigmoid(beta * margin)


def _divergence(policy: Scores, reference: Scores) -> Tensor:
    """(B,) sums of KL(reference || model) over the scored positions."""
    ours, theirs = policy["original"], reference["original"]
    assert ours.distribution is not None and theirs.distribution is not None
    return ours.spread(ours.distribution.kl_from(theirs.distribution)).sum(-1)
