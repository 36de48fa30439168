"""The only forward pass of training: what a model says about sequences.

The output head is applied to the chosen positions only, in chunks, and each chunk is recomputed
in the backward pass. So at most one chunk of (positions x vocabulary) is alive at a time. What the
published losses read comes from chunks of the vocabulary; whole distributions, for other losses,
from chunks of positions.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from unlearn_llm.hidden import captured, reach_every_weight
from unlearn_llm.objective import Positions, scored_positions
from unlearn_llm.types import Answer, Distribution, Scored, Sequences
from unlearn_llm.vocabulary import (
    LogitStatistics,
    cross_entropy,
    kl_divergence,
    logit_margin,
    logit_statistics,
)
from unlearn_llm.vocabulary_chunks import Logits, Lowered

CHUNK_BYTES = 64 * 2**20
"""Size of one float32 chunk of (positions x vocabulary)."""

# Models whose logits are exactly the head applied to the last hidden state. Others (Gemma's soft
# cap, Cohere's scale) change the logits afterwards, so their full logits are read.
PLAIN_HEADS = {"llama", "phi", "phi3", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2"}


class ChunkedDistribution:
    """Next-token distributions at N positions, from hidden states and the output head."""

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        head: "Head",
        joint: "_Joint | None" = None,
        part: slice = slice(None),
    ) -> None:
        """Take hidden states and what makes logits of them.

        Args:
            hidden: (N, H), or (N, V) logits where the head is the identity.
            targets: (N,) int64, the tokens that came next.
            joint: The positions of all answers, of which these are `part`; None: there are no
                others.
        """
        self.hidden = hidden
        self.targets = targets
        self.head = head
        self.vocabulary = head.vocabulary
        self._joint = joint or _Joint(hidden, targets, head.linear)
        self._part = part

    def map(self, function: Callable[..., Tensor], *others: Distribution | Tensor) -> Tensor:
        """Apply `function(logps, *others)` chunk by chunk; see types.Distribution."""
        rows = max(1, CHUNK_BYTES // (4 * self.vocabulary))
        chunks = []
        for start in range(0, max(1, len(self.hidden)), rows):
            parts = [_slice(other, start, start + rows) for other in others]
            hidden = self.hidden[start : start + rows]
            if torch.is_grad_enabled():
                chunk = checkpoint(self._chunk, function, hidden, *parts, use_reentrant=False)
            else:
                chunk = self._chunk(function, hidden, *parts)
            chunks.append(chunk)
        return torch.cat(chunks)

    def token_logps(self) -> Tensor:
        """Compute log-probabilities of the targets; see types.Distribution."""
        if self._joint.logits is None:
            return self.map(_logp_of_target, self.targets)
        statistics = self._joint.statistics
        return (statistics.target - statistics.logsumexp)[self._part]

    def token_log_odds(self) -> Tensor:
        """Compute log-odds of the targets; see types.Distribution."""
        if self._joint.logits is None:
            return self.map(_log_odds_of_target, self.targets)
        statistics = self._joint.statistics
        return (statistics.target - statistics.others)[self._part]

    def divergence_from_uniform(self) -> Tensor:
        """Compute KL(uniform || model); see types.Distribution."""
        if self._joint.logits is None:
            return self.map(_divergence_from_uniform)
        statistics = self._joint.statistics
        divergence = statistics.logsumexp - statistics.mean - math.log(self.vocabulary)
        return divergence[self._part]

    def margin(self) -> Tensor:
        """Compute the largest logit minus the mean; see types.Distribution."""
        logits = self._linear_logits()
        return self.map(_margin) if logits is None else logit_margin(logits)

    def kl_from(self, reference: Distribution) -> Tensor:
        """Compute KL(reference || model); see types.Distribution."""
        both = self._linear_pair(reference)
        if both is None or both[0].hidden.requires_grad:
            return self.map(_kl_divergence, reference)
        return kl_divergence(*both)

    def cross_entropy_from(self, reference: Distribution, *, lowered: float) -> Tensor:
        """Compute -sum q log p, q the lowered reference; see types.Distribution."""
        both = self._linear_pair(reference)
        if both is None:
            return self.map(partial(_cross_entropy, lowered), reference, self.targets)
        return cross_entropy(*both, Lowered(self.targets, lowered))

    def _linear_pair(self, reference: Distribution) -> tuple[Logits, Logits] | None:
        """The reference's logits and ours; None where a head is not plain, or tokens differ."""
        if not isinstance(reference, ChunkedDistribution):
            return None
        theirs, ours = reference._linear_logits(), self._linear_logits()
        if theirs is None or ours is None or reference.vocabulary != self.vocabulary:
            return None
        return theirs, ours

    def _linear_logits(self) -> Logits | None:
        linear = self.head.linear
        return None if linear is None else Logits(self.hidden, linear.weight, linear.bias)

    def _chunk(self, function: Callable[..., Tensor], hidden: Tensor, *parts: Any) -> Tensor:
        others = [p._logps(p.hidden) if isinstance(p, ChunkedDistribution) else p for p in parts]
        return function(self._logps(hidden), *others)

    def _logps(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(self.head.apply(hidden).float(), dim=-1)


class _Joint:
    """The positions of all answers: walked through together, the head gets one gradient."""

    def __init__(self, hidden: Tensor, targets: Tensor, linear: nn.Linear | None) -> None:
        self.hidden = hidden
        self.targets = targets
        self.logits = None if linear is None else Logits(hidden, linear.weight, linear.bias)

    @cached_property
    def statistics(self) -> LogitStatistics:
        """What log-probabilities and divergences are made of, at all positions."""
        assert self.logits is not None
        return logit_statistics(self.logits, self.targets)


def _logp_of_target(logps: Tensor, targets: Tensor) -> Tensor:
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def _log_odds_of_target(logps: Tensor, targets: Tensor) -> Tensor:
    others = logps.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)  # exact for p near 1
    return _logp_of_target(logps, targets) - others


def _margin(logps: Tensor) -> Tensor:
    """The same of log-probabilities as of logits: they differ by a constant."""
    return logps.max(-1).values - logps.mean(-1)


def _divergence_from_uniform(logps: Tensor) -> Tensor:
    return -math.log(logps.shape[-1]) - logps.mean(-1)


def _kl_divergence(logps: Tensor, reference_logps: Tensor) -> Tensor:
    return F.kl_div(logps, reference_logps, reduction="none", log_target=True).sum(-1)


def _cross_entropy(
    lowered: float, logps: Tensor, reference_logps: Tensor, targets: Tensor
) -> Tensor:
    by = torch.full_like(targets[:, None], -lowered, dtype=reference_logps.dtype)
    constant = reference_logps.detach().scatter_add(1, targets[:, None], by).softmax(-1)
    return -(constant * logps).sum(-1)


def _slice(other: Distribution | Tensor, start: int, stop: int) -> Any:
    if isinstance(other, ChunkedDistribution):
        part = slice(start, stop)
        return ChunkedDistribution(other.hidden[part], other.targets[part], other.head)
    if isinstance(other, Tensor):
        return other[start:stop]
    raise TypeError(f"Expected a ChunkedDistribution or a tensor, got {type(other).__name__}.")


def score(
    model: nn.Module,
    sequences: Mapping[Answer, Sequences],
    positions: Positions = "answer",
    layers: Sequence[int] = (),
) -> dict[Answer, Scored]:
    """Score sequences with a forward pass, on a CPU one for each answer.

    Args:
        model: A causal language model, wrapped (DDP, peft) or not.
        sequences: By answer; each (B, T), T may differ.
        positions: Which tokens are scored; see objective.Loss.
        layers: Decoder layers whose hidden states are given too.
    """
    hidden, masks, targets = {}, {}, {}
    inner: dict[Answer, dict[int, Tensor]] = {answer: {} for answer in sequences}
    with hidden_states_for_logits(model) as head, captured(unwrapped(model), layers) as states:
        for answers in _forward_passes(sequences):
            joined = _join([sequences[answer] for answer in answers])
            outputs = model(**joined, use_cache=False).logits  # (B, T, H), or V without head
            n_rows = [len(sequences[answer]["input_ids"]) for answer in answers]
            for answer, rows in zip(answers, outputs.split(n_rows), strict=True):
                mask = scored_positions(sequences[answer], positions)
                hidden[answer] = rows[:, : mask.shape[1]][mask]
                masks[answer] = mask
                targets[answer] = sequences[answer]["input_ids"][:, 1:]
            for layer, state in reach_every_weight(states, model).items():
                for answer, rows in zip(answers, state.split(n_rows), strict=True):
                    mask = masks[answer]
                    inner[answer][layer] = rows[:, : mask.shape[1]][mask]
    next_tokens = {answer: targets[answer][mask] for answer, mask in masks.items()}
    found = distributions(hidden, next_tokens, head)
    return {a: Scored(masks[a], targets[a], found[a], hidden=inner[a]) for a in sequences}


def _forward_passes(sequences: Mapping[Answer, Sequences]) -> list[list[Answer]]:
    """Which answers go through the model together.

    On a CPU each for itself, without padding to the longest answer: of TOFU's answers and refusals
    that is a sixth of the tokens. A GPU would rather have one large batch than two small ones.
    """
    answers = list(sequences)
    on_cpu = sequences[answers[0]]["input_ids"].device.type == "cpu"
    return [[answer] for answer in answers] if on_cpu else [answers]


def distributions(
    hidden: Mapping[Answer, Tensor], targets: Mapping[Answer, Tensor], head: "Head"
) -> dict[Answer, ChunkedDistribution]:
    """Give each answer's distributions; a plain head is applied to all of them together.

    Args:
        hidden: By answer (N, H), or (N, V) logits where the head is the identity; N may differ.
        targets: By answer (N,) int64, the tokens that came next.
    """
    if head.linear is None:
        return {a: ChunkedDistribution(hidden[a], targets[a], head) for a in hidden}
    joint = _Joint(torch.cat(list(hidden.values())), torch.cat(list(targets.values())), head.linear)
    found, start = {}, 0
    for answer, own in targets.items():
        part = slice(start, start + len(own))
        found[answer] = ChunkedDistribution(joint.hidden[part], own, head, joint, part)
        start = part.stop
    return found


def _join(parts: Sequence[Sequences]) -> dict[str, Tensor]:
    """Stack the answers' sequences into one batch, padded to the longest."""
    width = max(part["input_ids"].shape[1] for part in parts)
    return {
        "input_ids": torch.cat([_widen(part["input_ids"], width) for part in parts]),
        "attention_mask": torch.cat([_widen(part["attention_mask"], width) for part in parts]),
    }


def _widen(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[1]))


class Head:
    """The output head of a model, or the identity where logits are read whole.

    Attributes:
        linear: The head's module, if it does nothing but multiply with its own plain weight.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        vocabulary: int,
        linear: nn.Linear | None = None,
    ) -> None:
        self.apply = apply
        self.vocabulary = vocabulary
        self.linear = linear


@contextmanager
def hidden_states_for_logits(model: nn.Module) -> Iterator[Head]:
    """Let the model return hidden states where it would return logits; yield the head.

    The call still goes through the wrapped model, so DDP and peft see an ordinary forward.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    vocabulary = int(inner.config.vocab_size)
    if (
        inner.config.model_type not in PLAIN_HEADS
        or not isinstance(head, nn.Linear)
        or _is_spread(model, head)
    ):
        yield Head(lambda logits: logits, vocabulary)
        return
    vocabulary = head.out_features
    original = head.forward
    own = vars(head).get("forward")  # accelerate's offloading puts one there
    linear = head if _is_plain_linear(head) else None
    # On the instance, so that the class and other models stay as they are.
    head.forward = nn.Identity().forward  # type: ignore[method-assign]
    try:
        yield Head(original, vocabulary, linear)
    finally:
        del head.forward
        if own is not None:
            head.forward = own  # type: ignore[method-assign]


def _is_spread(model: nn.Module, head: nn.Linear) -> bool:
    """Is the head's weight whole only while its own forward runs (FSDP2, DeepSpeed ZeRO-3)?"""
    return isinstance(model, FSDPModule) or hasattr(head.weight, "ds_id")


def _is_plain_linear(head: nn.Linear) -> bool:
    """No subclass (4 bits), no sharded or quantised weight, no forward put in its place."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and "forward" not in vars(head)
    )


def unwrapped(model: nn.Module) -> Any:
    """Find the transformers model inside DDP, DeepSpeed and peft wrappers."""
    found: Any = model
    deepspeed = sys.modules.get("deepspeed")  # it takes seconds to import
    wrappers: tuple[Any, ...] = (nn.parallel.DistributedDataParallel,)
    if deepspeed is not None:
        wrappers += (deepspeed.DeepSpeedEngine,)
    if isinstance(found, wrappers):
        found = found.module
    return found.get_base_model() if isinstance(found, PeftModel) else found
