"""Forget losses that move whole next-token distributions of the answer."""

from collections.abc import Mapping

import torch
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
    ours, targets = _answer(policy["original"])
    theirs, _ = _answer(reference["original"])

    def distil(logps: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        lowered = torch.full_like(tokens[:, None], -beta, dtype=teacher.dtype)
        teacher = teacher.detach().scatter_add(1, tokens[:, None], lowered).softmax(-1)
        return -(teacher * logps).sum(-1)

    return policy["original"].spread(ours.map(distil, theirs, targets)).sum(-1)


@forget_loss("ceu", kind="untargeted", per="token", positions="answer_after_first")
def ceu(policy: Scores) -> Tensor:
    """Learn the model's own distribution without the answer's token, token mean.

    KL(q || model), where q is the softmax of the logits with the token's at -inf; that is
    -log(1 - p). The first token of every answer is left alone.

    Source: Yang 2025 (CE-U), arXiv:2503.01224, with the footnote on the first token.
    Differs: the author's cross-entropy under sg[q] is larger by the entropy of q, held constant:
        the same gradient, but a value that does not fall to 0 as the answer is forgotten.
    """
    ours, targets = _answer(policy["original"])
    return policy["original"].spread(ours.map(_without_token, targets)).sum(-1)


@forget_loss("pdu", kind="untargeted", per="token")
def pdu(policy: Scores) -> Tensor:
    """Flatten the logits: (largest - mean)^2 at every answer position, token mean.

    The forget side of constrained entropic unlearning; the multiplier of its constraint on the
    retain loss is `retain_weight`.

    Source: Entesari et al. 2025 (PDU), arXiv:2506.05314.
    Differs: the logit before an answer's token is flattened, not the one after it, which the
        released mask (not shifted) chooses.
    """
    ours, _ = _answer(policy["original"])
    return policy["original"].spread(ours.map(_squared_margin)).sum(-1)


def _without_token(logps: Tensor, tokens: Tensor) -> Tensor:
    """-log(1 - p) as a sum over the other tokens, which is exact for p near 1."""
    return -logps.scatter(1, tokens[:, None], -torch.inf).logsumexp(-1)


def _squared_margin(logps: Tensor) -> Tensor:
    """The same of log-probabilities as of logits: they differ by a constant."""
    return (logps.amax(-1) - logps.mean(-1)).square()


def _answer(scored: Scored) -> tuple[Distribution, Tensor]:
    """The distributions at the scored positions, and the tokens that came next."""
    assert scored.distribution is not None  # always there but in precomputed references
    return scored.distribution, scored.targets[scored.mask]
