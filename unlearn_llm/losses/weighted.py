"""Forget losses that are an ascent with a weight for each token, detached from the gradient.

p is the probability of an answer's token, p_ref the reference's, sg[...] a constant.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.objective import forget_loss
from unlearn_llm.types import Answer, Scored

Scores = Mapping[Answer, Scored]


@forget_loss("wga", kind="untargeted", per="token")
def wga(policy: Scores, *, beta: float = 1.0) -> Tensor:
    """Weighted gradient ascent: log p times sg[p]^beta, token mean. What is forgotten, rests.

    Source: Wang et al. 2025 (G-effect), arXiv:2502.19301.
    Differs: no difference; beta is open-unlearning's 1, the authors' own code has 5.
    """
    logps = policy["original"].token_logps
    return ((beta * logps.detach()).exp() * logps).sum(-1)


@forget_loss("satimp", kind="untargeted", per="token")
def satimp(policy: Scores, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """Saturation and importance: log p times sg[p]^beta1 (1 - sg[p])^beta2, token mean.

    Source: Yang et al. 2025 (SatImp), arXiv:2505.11953.
    Differs: no difference; 1 - p is taken as -expm1(log p), exact for p near 1.
    """
    logps = policy["original"].token_logps
    constant = logps.detach()
    weight = (beta1 * constant).exp() * (-constant.expm1()) ** beta2
    return (weight * logps).sum(-1)


@forget_loss("tnpo", kind="untargeted", per="token", reference="logp")
def tnpo(policy: Scores, reference: Scores, *, beta: float = 4.0) -> Tensor:
    """Token-wise NPO: -(2/beta) log sigmoid(-beta log(p / p_ref)) of each token, token mean.

    Its gradient is that of log p with the weight 2 p^beta / (p^beta + p_ref^beta).

    Source: Wang et al. 2025 (G-effect), arXiv:2502.19301.
    Differs: the authors minimise log p times the detached weight: the same gradient, but a value
        that says little, where this one falls to 0 as the answer is forgotten.
    """
    return _token_npo(policy, reference, beta).sum(-1)


@forget_loss("wtnpo", kind="untargeted", per="token", reference="logp")
def wtnpo(policy: Scores, reference: Scores, *, beta: float = 4.0, alpha: float = 1.5) -> Tensor:
    """Weighted token-wise NPO: that of `tnpo` times sg[p]^alpha, token mean.

    Its gradient is that of log p with the weight 2 p^(beta + alpha) / (p^beta + p_ref^beta).

    Source: Wang et al. 2025 (G-effect), arXiv:2502.19301.
    Differs: as `tnpo`.
    """
    logps = policy["original"].token_logps
    weight = (alpha * logps.detach()).exp()
    return (weight * _token_npo(policy, reference, beta)).sum(-1)


def _inverse_loss(policy: Scores, lambd: float = 0.5) -> Tensor:
    """(B,) weights 1 / CE^lambd of whole answers, constants; CE = S/T."""
    scored = policy["original"]
    # The authors' 1e-15: an answer that is known for certain has a large weight, not an infinite.
    return 1 / ((-scored.logp.detach() / scored.length) ** lambd + 1e-15)


@forget_loss("adaga", kind="untargeted", per=_inverse_loss)
def adaga(policy: Scores, *, lambd: float = 0.5) -> Tensor:
    """Adaptive gradient ascent of SFRon: -S/T, weighted by sg[(S/T)^-lambd], mean of the weights.

    Answers that are still known get the large weights. Unbounded below. Its coefficient a_t is
    `forget_weight` with `forget_weight_schedule: cosine`, its mask `mask: sfron`.

    Source: Huang et al. 2024 (SFRon), arXiv:2409.19732; K1nght/Unified-Unlearning-w-Remain-Geometry
        Classification/unlearn/sfron.py AdaptiveLoss.
    Differs: an image is an answer, and its cross-entropy the answer's token mean. Weights are
        normalised over the window, not over a micro-batch.
    """
    scored = policy["original"]
    return _inverse_loss(policy, lambd) * scored.logp / scored.length


def _token_npo(policy: Scores, reference: Scores, beta: float) -> Tensor:
    """(B, T-1), 0 where no token is scored."""
    scored = policy["original"]
    log_ratio = scored.token_logps - reference["original"].token_logps
    return -2 / beta * F.logsigmoid(-beta * log_ratio) * scored.mask
