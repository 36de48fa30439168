"""The only forward pass of training: what a model says about sequences.

The output head is applied to the chosen positions only, in chunks, and each chunk is recomputed
in the backward pass. So at most one chunk of (positions x vocabulary) is alive at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlearn_llm.objective import Positions
from unlearn_llm.types import IGNORE_INDEX, Answer, Distribution, Scored, Sequences

CHUNK_BYTES = 64 * 2**20
"""Size of one float32 chunk of (positions x vocabulary)."""

# Models whose logits are exactly the head applied to the last hidden state. Others (Gemma's soft
# cap, Cohere's scale) change the logits afterwards, so their full logits are read.
PLAIN_HEADS = {"llama", "phi", "phi3", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2"}


class ChunkedDistribution:
    """Next-token distributions at N positions, from hidden states and the output head."""

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> None:
        self.hidden = hidden
        self.head = head
        self.vocabulary = vocabulary

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

    def _chunk(self, function: Callable[..., Tensor], hidden: Tensor, *parts: Any) -> Tensor:
        others = [p._logps(p.hidden) if isinstance(p, ChunkedDistribution) else p for p in parts]
        return function(self._logps(hidden), *others)

    def _logps(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(self.head(hidden).float(), dim=-1)


def _slice(other: Distribution | Tensor, start: int, stop: int) -> Any:
    if isinstance(other, ChunkedDistribution):
        return ChunkedDistribution(other.hidden[start:stop], other.head, other.vocabulary)
    if isinstance(other, Tensor):
        return other[start:stop]
    raise TypeError(f"Expected a ChunkedDistribution or a tensor, got {type(other).__name__}.")


def score(
    model: nn.Module, sequences: Mapping[Answer, Sequences], positions: Positions = "answer"
) -> dict[Answer, Scored]:
    """Score sequences with one forward pass for all answers.

    Args:
        model: A causal language model, wrapped (DDP, peft) or not.
        sequences: By answer; each (B, T), T may differ.
        positions: "answer": the labelled tokens; "attended": every real token.
    """
    joined = _join(list(sequences.values()))
    inputs = {key: joined[key] for key in ("input_ids", "attention_mask")}
    with hidden_states_for_logits(model) as head:
        outputs = model(**inputs, use_cache=False).logits[:, :-1]  # (B, T-1, H), or V without head
    targets = joined["input_ids"][:, 1:]
    if positions == "answer":
        mask = joined["labels"][:, 1:] != IGNORE_INDEX
    else:
        mask = joined["attention_mask"][:, 1:].bool()
    scored, start = {}, 0
    for answer, rows in sequences.items():
        n_rows, width = rows["input_ids"].shape
        part = slice(start, start + n_rows), slice(width - 1)  # without the padding of _join
        start += n_rows
        distribution = ChunkedDistribution(outputs[part][mask[part]], head.apply, head.vocabulary)
        scored[answer] = Scored(mask[part], targets[part], distribution)
    return scored


def _join(parts: Sequence[Sequences]) -> dict[str, Tensor]:
    """Stack the answers' sequences into one batch, padded to the longest."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        key: torch.cat([_widen(part[key], width, fill) for part in parts])  # type: ignore[literal-required]
        for key, fill in fills.items()
    }


def _widen(tensor: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)


class Head:
    """The output head of a model, or the identity where logits are read whole."""

    def __init__(self, apply: Callable[[Tensor], Tensor], vocabulary: int) -> None:
        self.apply = apply
        self.vocabulary = vocabulary


@contextmanager
def hidden_states_for_logits(model: nn.Module) -> Iterator[Head]:
    """Let the model return hidden states where it would return logits; yield the head.

    The call still goes through the wrapped model, so DDP and peft see an ordinary forward.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    vocabulary = int(inner.config.vocab_size)
    if inner.config.model_type not in PLAIN_HEADS or not isinstance(head, nn.Linear):
        yield Head(lambda logits: logits, vocabulary)
        return
    vocabulary = head.out_features
    original = head.forward
    # On the instance, so that the class and other models stay as they are.
    head.forward = nn.Identity().forward  # type: ignore[method-assign]
    try:
        yield Head(original, vocabulary)
    finally:
        del head.forward


def unwrapped(model: nn.Module) -> Any:
    """Find the transformers model inside DDP and peft wrappers."""
    found: Any = model
    if isinstance(found, nn.parallel.DistributedDataParallel):
        found = found.module
    return found.get_base_model() if isinstance(found, PeftModel) else found
