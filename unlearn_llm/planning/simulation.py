"""One optimiser step's forward and backward passes, on tensors without contents.

The model is the real one, made from its config: any architecture, with adapter, autocast and
checkpointing. So what autograd keeps is counted, not guessed, and takes neither weights nor memory.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unlearn_llm.planning.live import Live
from unlearn_llm.scoring import (
    PLAIN_HEADS,
    Head,
    distributions,
    hidden_states_for_logits,
    unwrapped,
)
from unlearn_llm.types import Answer


class Shape(NamedTuple):
    """The sequences of one answer in a micro-batch: (rows, width), padding included."""

    rows: int
    width: int
    scored: int
    """Positions whose next token is scored."""


class Side(NamedTuple):
    """What a micro-batch holds of one role."""

    answers: Mapping[Answer, Shape]
    reference: bool
    """Is a reference asked at every step, too?"""


class Cost(NamedTuple):
    """What a step's passes take, beyond weights and states; bytes, and floating point operations.

    Attributes:
        activations: Alive when the forward pass is done.
        logits: Most while the output head is applied, beyond what was there.
        peak: Most at any moment, gradients included as far as there are any.
        without_gradients: Most at any moment without gradients.
        forward: Operations of one forward pass of one micro-batch.
        flops: Operations of one micro-batch.
    """

    activations: int
    logits: int
    peak: int
    without_gradients: int
    forward: int
    flops: int


@dataclass(frozen=True)
class Passes:
    """How a micro-batch goes through the model."""

    bf16: bool = False
    """Under autocast."""
    together: bool = False
    """Do all answers go through the model as one batch (scoring.py: on GPUs)?"""
    accumulate: bool = False
    """Are there gradients of an earlier micro-batch?"""
    whole_logits: bool = False
    """Is it a fine-tuning step of the plain Trainer, with the logits of all positions?"""
    apart: bool = False
    """Has each side a backward pass of its own? Its gradients then stay through the next."""


def simulate(model: nn.Module, mode: FakeTensorMode, sides: Sequence[Side], how: Passes) -> Cost:
    """Run a micro-batch through a model of fake tensors.

    Args:
        model: Made under `mode`, as it trains: dtypes, adapter, checkpointing.
        sides: By role that the step trains.
    """
    done, aside = [], []
    with mode:
        live = Live([*model.parameters(), *model.buffers()])
        with live:
            for group in [[side] for side in sides] if how.apart else [sides]:
                for _ in range(1 + how.accumulate):
                    micro_batch = _micro_batch(model, group, how, live)
                done.append(micro_batch)
                for parameter in model.parameters():
                    aside.append(parameter.grad)  # as a combination does
                    parameter.grad = None
    return Cost(
        max(one.activations for one in done),
        max(one.logits for one in done),
        live.peak,
        live.peak_without_gradients,
        sum(one.forward for one in done),
        sum(one.flops for one in done),
    )


class _Done(NamedTuple):
    """Of one micro-batch: bytes after the forward pass, bytes of logits, operations."""

    activations: int
    logits: int
    forward: int
    flops: int


def _micro_batch(model: nn.Module, sides: Sequence[Side], how: Passes, live: Live) -> _Done:
    """Do a forward pass of each side, and one backward pass."""
    before, logits = live.flops, 0
    losses = []
    for side in sides:
        with _autocast(how.bf16):
            if how.whole_logits:
                loss, of_side = _whole_logits(model, side)
            else:
                loss, of_side = _score(model, side, how, live)
        losses.append(loss)
        logits = max(logits, of_side)
    activations, forward = live.now - live.gradients, live.flops - before
    torch.stack(losses).sum().backward()
    return _Done(activations, logits, forward, live.flops - before)


def _score(model: nn.Module, side: Side, how: Passes, live: Live) -> tuple[Tensor, int]:
    """Do what scoring.score does, with as many positions as are scored, wherever they are."""
    hidden = _hidden(model, side, how)
    with torch.no_grad():
        reference = _hidden(model, side, how) if side.reference else None
    targets = {
        answer: torch.zeros(len(states), dtype=torch.int64) for answer, states in hidden.items()
    }
    head = _head(model)
    found = distributions(hidden, targets, head)
    live.mark()
    if reference is None:
        losses = [one.token_logps().sum() for one in found.values()]
    else:
        constant = distributions(reference, targets, head)
        losses = [one.kl_from(constant[answer]).sum() for answer, one in found.items()]
    return torch.stack(losses).sum(), live.above_mark()


def _hidden(model: nn.Module, side: Side, how: Passes) -> dict[Answer, Tensor]:
    shapes = side.answers
    groups = [list(shapes)] if how.together else [[answer] for answer in shapes]
    hidden = {}
    with hidden_states_for_logits(model):
        for answers in groups:
            width = max(shapes[answer].width for answer in answers)
            outputs = _states(model, sum(shapes[answer].rows for answer in answers), width)
            n_rows = [shapes[answer].rows for answer in answers]
            for answer, rows in zip(answers, outputs.split(n_rows), strict=True):
                flat = rows[:, : shapes[answer].width].reshape(-1, rows.shape[-1])
                hidden[answer] = flat[: shapes[answer].scored].clone()
    return hidden


def _states(model: nn.Module, rows: int, width: int) -> Tensor:
    ids = torch.zeros(rows, width, dtype=torch.int64)
    outputs: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return outputs.float()  # accelerate does that to what leaves an autocast model


def _whole_logits(model: nn.Module, side: Side) -> tuple[Tensor, int]:
    (shape,) = side.answers.values()
    ids = torch.zeros(shape.rows, shape.width, dtype=torch.int64)
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())
    return outputs.loss, outputs.logits.nbytes


def _head(model: nn.Module) -> Head:
    """The head as training applies it; a fake weight does not look like a plain parameter."""
    with hidden_states_for_logits(model) as head:
        inner = unwrapped(model)
        linear = inner.get_output_embeddings()
        plain = inner.config.model_type in PLAIN_HEADS and type(linear) is nn.Linear
    return Head(head.apply, head.vocabulary, linear) if plain else head


def _autocast(bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
