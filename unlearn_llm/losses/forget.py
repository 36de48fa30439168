"""Forget losses. Each takes scored sequences and returns one number per sequence, minimised.

S is the negative log-likelihood of a whole answer in nats, T its number of tokens.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.objective import forget_loss
from unlearn_llm.types import Answer, Scored

Scores = Mapping[Answer, Scored]


@forget_loss("ga", kind="untargeted", per="token")
def ga(policy: Scores) -> Tensor:
    """Gradient ascent: minus the token mean of the answer's negative log-likelihood.

    Unbounded below.

    Source: Maini et al. 2024 (TOFU), locuslab/tofu dataloader.py "grad_ascent".
    Differs: no difference, but the token mean is taken over the whole window.
    """
    return policy["original"].logp


@forget_loss("me", kind="untargeted", per="token")
def me(policy: Scores) -> Tensor:
    """Maximise entropy: KL(uniform || model) at every answer position, token mean.

    Source: Yuan et al. 2024 (closer look), losses.get_me_loss.
    Differs: logsumexp - mean - log V of the logits; the authors' log(softmax + 1e-12) changes
        gradients by 1.5e-5 relative. Scores the answer only, as the DualOptim scripts do
        (mask=true); closer-look's mask=false also averages over padding to 500 tokens.
    """
    scored = policy["original"]
    assert scored.distribution is not None  # the policy is always scored with its distribution
    return scored.spread(scored.distribution.divergence_from_uniform()).sum(-1)


@forget_loss("idk", kind="targeted", per="token", answers=("idk",))
def idk(policy: Scores) -> Tensor:
    """Learn a refusal instead of the answer: token mean of its negative log-likelihood.

    Source: Maini et al. 2024 (TOFU); CityU-MLO/DualOptimPlus losses.py "IDK".
    Differs: the refusal of a row is fixed by (seed, row) without touching the global generator.
    """
    return -policy["idk"].logp


@forget_loss("dpo", kind="targeted", per="sequence", answers=("idk", "original"), reference="logp")
def dpo(policy: Scores, reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Prefer the refusal to the answer: -(2/beta) log sigmoid(beta * (chosen - rejected)).

    Both log-ratios are sums over tokens against the reference.

    Source: Rafailov et al. 2023; Zhang et al. 2024 (NPO); closer-look losses.py.
    Differs: TOFU's own code has no factor 2/beta.
    """
    return _preference(policy, reference, "idk", beta)


@forget_loss("npo", kind="untargeted", per="sequence", reference="logp")
def npo(policy: Scores, reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Negative preference: -(2/beta) log sigmoid(beta * (S - S_reference)), sequence sums.

    Source: Zhang et al. 2024, arXiv:2404.05868 eq. (3).
    Differs: the reference's log-probabilities are computed once, not at every step.
    """
    log_ratio = policy["original"].logp - reference["original"].logp
    return -2 / beta * F.logsigmoid(-beta * log_ratio)


@forget_loss("simnpo", kind="untargeted", per="sequence")
def simnpo(policy: Scores, *, beta: float = 2.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference, length-normalised: -(2/beta) log sigmoid(beta * (S/T - delta)).

    Source: Fan et al. 2024, arXiv:2410.07163; OPTML-Group/Unlearn-Simple (TOFU).
    Differs: no difference; the paper writes the margin outside, gamma = beta * delta.
    """
    scored = policy["original"]
    loss_per_token = -scored.logp / scored.length
    return -2 / beta * F.logsigmoid(beta * (loss_per_token - delta))


@forget_loss(
    "altpo", kind="untargeted", per="sequence", answers=("alternate", "original"), reference="logp"
)
def altpo(policy: Scores, reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Prefer an alternate answer to the original: `dpo` with the row's alternate as chosen.

    Source: Mekala et al. 2024 (AltPO), arXiv:2409.13474.
    Differs: no difference; several alternates of one question are several rows.
    """
    return _preference(policy, reference, "alternate", beta)


def _preference(policy: Scores, reference: Scores, answer: Answer, beta: float) -> Tensor:
    chosen = policy[answer].logp - reference[answer].logp
    rejected = policy["original"].logp - reference["original"].logp
    return -2 / beta * F.logsigmoid(beta * (chosen - rejected))
