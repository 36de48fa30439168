"""Forget losses that move whole next-token distributions of the answer."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.objective import forget_loss
from unlearn_llm.types import Answer, Distribution, Scored

Scores = Mapping[Answer, Scored]


@forget_loss("undial", kind="untargeted", per="token", reference="distribution")
def undial(policy: Scores, reference: Scores, *, beta: float = 10.0) -> Tensor:
    """Self-distil from the reference with the answer's logit lowered by beta, token mean.

    Cross-entropy of the model under softmax(reference logits - beta * onehot(answer's token)).

    Source: Dong et al. 2024 (UNDIAL), arXiv:2402.10052.
    Differs: scores the answer's tokens only; open-unlearning also averages over prompt and padding,
        where it lowers an unrelated token.
    """
    ours, theirs = _answer(policy), _answer(reference)
    return policy["original"].spread(ours.cross_entropy_from(theirs, lowered=beta)).sum(-1)


@forget_loss("ceu", kind="untargeted", per="token", positions="answer_after_first")
def ceu(policy: Scores) -> Tensor:
    """Learn the model's own distribution without the answer's token, token mean.

    KL(q || model), where q is the softmax of the logits with the token's at -inf; that is
    -log(1 - p). The first token of every answer is left alone.

    Source: Yang 2025 (CE-U), arXiv:2503.01224, with the footnote on the first token.
    Differs: the author's cross-entropy under sg[q] is larger by the entropy of q, held constant:
        the same gradient, but a value that does not fall to 0 as the answer is forgotten.
    """
    # -log(1 - p) of log-odds: exact for p near 1.
    return policy["original"].spread(F.softplus(_answer(policy).token_log_odds())).sum(-1)


@forget_loss("pdu", kind="untargeted", per="token")
def pdu(policy: Scores) -> Tensor:
    """Flatten the logits: (largest - mean)^2 at every answer position, token mean.

    The forget side of constrained entropic unlearning; the multiplier of its constraint on the
    retain loss is `retain_weight`.

    Source: Entesari et al. 2025 (PDU), arXiv:2506.05314.
    Differs: the logit before an answer's token is flattened, not the one after it, which the
        released mask (not shifted) chooses.
    """
    return policy["original"].spread(_answer(policy).margin().square()).sum(-1)


@forget_loss("scrub", kind="untargeted", per="token", reference="distribution")
def scrub(policy: Scores, reference: Scores) -> Tensor:
    """Leave the teacher: -KL(reference || model) at the answer's positions, token mean.

    Unbounded below. At the reference, where a run begins, its gradient is rounding alone, of which
    Adam makes a first step like any other.

    Source: Kurmanji et al. 2023 (SCRUB), arXiv:2302.09880; meghdadk/SCRUB helper/loops.py.
    Differs: an image is a position of an answer; the distillation's temperature is 1.
    """
    divergence = _answer(policy).kl_from(_answer(reference))
    return -policy["original"].spread(divergence).sum(-1)


def _answer(scores: Scores) -> Distribution:
    distribution = scores["original"].distribution
    assert distribution is not None  # always there but in precomputed references
    return distribution
