"""Losses on hidden states: what decoder layers put out where the answer is predicted.

A loss with an argument `layers` gets `Scored.hidden` of these layers, counted from 0.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn_llm.objective import forget_loss, retain_loss
from unlearn_llm.types import Answer, Scored

Scores = Mapping[Answer, Scored]


@forget_loss("rmu", kind="untargeted", per="token")
def rmu(
    policy: Scores, *, layers: Sequence[int] = (7,), steering: float = 2.0, seed: int = 0
) -> Tensor:
    """Steer hidden states to one random vector of length `steering`: MSE, token mean.

    The vector is uniform in [0, 1)^H, then scaled; fixed by `seed`. The retain loss is
    `embed_diff`.

    Source: Li et al. 2024 (RMU, WMDP), arXiv:2403.03218; steering 2 as in open-unlearning.
    Differs: the mean is over answer tokens, and exact. The authors also count padding;
        open-unlearning divides every sequence's sum by the length of every other.
    """
    scored = policy["original"]

    def error(layer: int) -> Tensor:
        hidden = scored.hidden[layer].float()
        generator = torch.Generator().manual_seed(seed)
        direction = torch.rand(hidden.shape[-1], generator=generator)
        target = steering * F.normalize(direction, dim=0)
        return (hidden - target.to(hidden.device)).square().mean(-1)

    return _mean_over_layers(scored, layers, error)


@forget_loss("rr", kind="untargeted", per="token", reference="hidden")
def rr(policy: Scores, reference: Scores, *, layers: Sequence[int] = (9, 19)) -> Tensor:
    """Representation rerouting: ReLU of the cosine with the reference's hidden state, token mean.

    Its retain loss is `embed_l2`.

    Source: Zou et al. 2024 (circuit breakers), arXiv:2406.04313.
    Differs: answer tokens only, because the tokens of a prompt template are the same in what is
        kept; constant weights, where the authors fade from this loss to the retain loss. Layers
        count from 0: the authors' hidden states 10 and 20 are the outputs of layers 9 and 19.
    """
    scored, other = policy["original"], reference["original"]

    def similarity(layer: int) -> Tensor:
        ours, theirs = scored.hidden[layer].float(), other.hidden[layer].float()
        return F.cosine_similarity(ours, theirs, dim=-1).relu()

    return _mean_over_layers(scored, layers, similarity)


@retain_loss("embed_diff", per="token", reference="hidden")
def embed_diff(policy: Scores, reference: Scores, *, layers: Sequence[int] = (7,)) -> Tensor:
    """Keep hidden states near the reference's: MSE, token mean.

    Source: Li et al. 2024 (RMU, WMDP), arXiv:2403.03218, the retain side; open-unlearning's
        EMBED_DIFF.
    Differs: as `rmu`.
    """
    scored, other = policy["original"], reference["original"]

    def error(layer: int) -> Tensor:
        return (scored.hidden[layer].float() - other.hidden[layer].float()).square().mean(-1)

    return _mean_over_layers(scored, layers, error)


@retain_loss("embed_l2", per="token", reference="hidden")
def embed_l2(policy: Scores, reference: Scores, *, layers: Sequence[int] = (9, 19)) -> Tensor:
    """Keep hidden states near the reference's: Euclidean distance, token mean.

    Source: Zou et al. 2024 (circuit breakers), arXiv:2406.04313, the retain side.
    Differs: as `rr`.
    """
    scored, other = policy["original"], reference["original"]

    def distance(layer: int) -> Tensor:
        ours, theirs = scored.hidden[layer].float(), other.hidden[layer].float()
        away: Tensor = torch.linalg.vector_norm(ours - theirs, dim=-1)  # its slope at 0 is 0
        return away

    return _mean_over_layers(scored, layers, distance)


def _mean_over_layers(
    scored: Scored, layers: Sequence[int], value: Callable[[int], Tensor]
) -> Tensor:
    """(B,) sums over the scored tokens of what `value` gives for a layer, (N,)."""
    return scored.spread(torch.stack([value(layer) for layer in layers]).mean(0)).sum(-1)
