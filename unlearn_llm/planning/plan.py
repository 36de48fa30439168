"""The plan of a recipe: memory per process, time per step and in all. Nothing is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unlearn_llm.combine.base import COMBINATIONS
from unlearn_llm.combine.base import build as build_combination
from unlearn_llm.errors import UserError
from unlearn_llm.planning.batches import Kind, StepKind, Workload, caches, tokens_of, workload
from unlearn_llm.planning.contentless import contentless
from unlearn_llm.planning.hardware import CPU, Hardware
from unlearn_llm.planning.memory import (
    SHARDED,
    Engine,
    Held,
    Memory,
    Weights,
    memory,
    weights_of,
)
from unlearn_llm.planning.simulation import Cost, Passes, Side, simulate
from unlearn_llm.planning.states import States, states_of
from unlearn_llm.recipe import Recipe
from unlearn_llm.types import ROLES, Role

# Vectors of the size of the trained weights that live between passes, beyond the gradient
# (tests/test_combining.py measures them), and passes of a step by those of a joint one.
VECTORS = {"surgery": 1, "pcgrad": 1, "mgda": 1, "ngdiff": 2, "blur": 1, "gru": 2, "ofmu": 6}
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""The old name of the setting and the new one."""
BYTES_OF_WEIGHT = 2
"""Times that weights are read in a micro-batch: forward and backward."""


@dataclass(frozen=True)
class Plan:
    """What a run takes; bytes and seconds, of one process.

    Attributes:
        seconds_per_step: By the roles that a step trains.
        seconds: Of all steps and of the reference before them; None: their number is not known.
        notes: What was assumed.
    """

    hardware: Hardware
    processes: int
    engine: Engine | None
    weights: Weights
    states: States
    memory: Memory
    steps: Mapping[Kind, int]
    seconds_per_step: Mapping[Kind, float]
    seconds: float | None
    notes: list[str]

    @property
    def needed(self) -> float:
        """Bytes at the peak, with what driver and libraries take."""
        return self.memory.peak + self.hardware.overhead

    @property
    def fits(self) -> bool:
        """Is there so much memory? An allocator that splits blocks may need some more."""
        return self.needed <= self.hardware.memory


def plan(
    recipe: Recipe,
    hardware: Hardware,
    *,
    processes: int = 1,
    engine: Engine | None = None,
    length: int | None = None,
) -> Plan:
    """Say what a run takes, from config.json, the recipe and, if they are at hand, the data.

    Args:
        processes: One per GPU.
        engine: How they divide the work; None: ddp, if there is more than one.
        length: Take this many tokens per row and do not look at data.

    Raises:
        UserError: there is no config.json, or the settings do not go together.
    """
    if engine is not None and processes == 1:
        raise UserError("--engine divides a run over processes; give --processes of 2 or more.")
    engine = engine or ("ddp" if processes > 1 else None)
    setting, finetune = recipe.setting, recipe.kind == "finetune"
    mode = FakeTensorMode()
    model = _model(recipe, mode)
    batches = workload(recipe, processes, length)
    states = states_of(
        model,
        optimizer=None if finetune else setting("optimizer"),
        parameters={} if finetune else setting("optimizer_parameters"),
        optim=str(getattr(setting("optim"), "value", setting("optim"))),
        quantize_embeddings=not finetune and setting("quantize_embeddings"),
    )
    held = _held(recipe, model, states)
    if engine in SHARDED and setting("bf16"):  # they gather weights in the dtype that multiplies
        model = _model(recipe, mode, gathered_in="bfloat16")
    costs = {
        kind: simulate(model, mode, _sides(recipe, of_kind), _passes(recipe, hardware))
        for kind, of_kind in batches.kinds.items()
    }
    worst = max(costs.values(), key=lambda cost: cost.peak)
    per_step = {
        kind: _seconds_of_step(recipe, hardware, held, states, cost, batches.kinds[kind])
        for kind, cost in costs.items()
    }
    steps = {kind: of_kind.steps for kind, of_kind in batches.kinds.items()}
    total = sum(steps[kind] * seconds for kind, seconds in per_step.items())
    total += _seconds_of_reference(recipe, hardware, held, batches, costs)
    notes = [f"Lengths: {batches.note.rstrip('.')}."]
    notes += [f"{states.note}."] if states.note else []
    if engine is not None:
        notes.append(f"What {engine} takes is arithmetic: no run on several GPUs was measured.")
    return Plan(
        hardware,
        processes,
        engine,
        held.weights,
        states,
        memory(held, worst, engine, processes),
        steps,
        per_step,
        total if batches.counted else None,
        notes,
    )


def _model(recipe: Recipe, mode: FakeTensorMode, gathered_in: str | None = None) -> nn.Module:
    setting, finetune = recipe.setting, recipe.kind == "finetune"
    settings = recipe.model
    if gathered_in is not None:
        settings = replace(settings, dtype=gathered_in)  # type: ignore[arg-type]  # a name of one
    return contentless(
        settings,
        mode,
        trainable=None if finetune else setting("trainable"),
        bf16=setting("bf16"),
        checkpointing=any(recipe.train.get(name) for name in CHECKPOINTING),
        masters=not finetune and gathered_in is None,
    )


def _passes(recipe: Recipe, hardware: Hardware) -> Passes:
    setting = recipe.setting
    finetune = recipe.kind == "finetune"
    combine = None if finetune else setting("combine")
    return Passes(
        bf16=setting("bf16"),
        together=hardware.name != CPU,
        accumulate=setting("gradient_accumulation_steps") > 1,
        whole_logits=finetune,
        apart=combine is not None and COMBINATIONS[combine].gradients,
    )


def _sides(recipe: Recipe, kind: StepKind) -> list[Side]:
    return [Side(shapes, _asks_model(recipe, role)) for role, shapes in kind.worst.items()]


def _asks_model(recipe: Recipe, role: Role) -> bool:
    """Is a reference model asked at every step?"""
    if recipe.kind == "finetune" or role not in recipe.objective().needs:
        return False
    return not caches(recipe, role)


def _held(recipe: Recipe, model: nn.Module, states: States) -> Held:
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    weights = weights_of(model, layers)
    if recipe.kind == "finetune":
        return Held(weights, states.kept)
    setting, combine = recipe.setting, recipe.setting("combine")
    asked = any(_asks_model(recipe, role) for role in ROLES)
    fresh = recipe.model.lora is not None and setting("trainable") is None
    by_adapter = setting("reference") == "adapter" or (setting("reference") == "auto" and fresh)
    vectors = VECTORS.get(combine, 0)
    if combine == "ngdiff" and setting("combine_parameters").get("probe_every") is None:
        vectors = 1
    return Held(
        weights,
        states.kept,
        reference=weights.all if asked and not by_adapter else 0,
        vectors=vectors * weights.trained,
        mask=weights.trained_entries if setting("mask") else 0,
    )


def _seconds_of_step(
    recipe: Recipe, hardware: Hardware, held: Held, states: States, cost: Cost, kind: StepKind
) -> float:
    """The larger of arithmetic and memory traffic, of the mean micro-batch; and the optimiser."""
    if not kind.steps:
        return 0.0
    accumulation = recipe.setting("gradient_accumulation_steps")
    tokens = kind.tokens / kind.steps / accumulation
    share = tokens / tokens_of(kind.worst)
    flops = share * cost.flops * _passes_of(recipe)
    moved = BYTES_OF_WEIGHT * held.weights.all + held.gradients + 2 * share * cost.activations
    micro_batch = max(flops / _rate(recipe, hardware, held), moved / hardware.bandwidth)
    # Weights are read and written, gradients read, and so are the states.
    step = (3 * held.weights.trained + 2 * states.touched) / hardware.bandwidth
    return accumulation * micro_batch + step


def _seconds_of_reference(
    recipe: Recipe,
    hardware: Hardware,
    held: Held,
    batches: Workload,
    costs: Mapping[Kind, Cost],
) -> float:
    """One forward pass over all rows of the roles whose reference is computed once."""
    if not batches.reference_tokens:
        return 0.0
    kind, cost = next(iter(costs.items()))
    per_token = cost.forward / tokens_of(batches.kinds[kind].worst)
    return batches.reference_tokens * per_token / _rate(recipe, hardware, held)


def _rate(recipe: Recipe, hardware: Hardware, held: Held) -> float:
    """Operations per second in the dtype that multiplies."""
    low = recipe.setting("bf16") or held.weights.all < 3 * held.weights.entries
    return hardware.utilisation * (hardware.bf16 if low else hardware.float32)


def _passes_of(recipe: Recipe) -> float:
    """Passes of a step, by those of a joint one."""
    combine = None if recipe.kind == "finetune" else recipe.setting("combine")
    if combine == "ofmu":
        made: Any = build_combination(combine, recipe.setting("combine_parameters"))
        return (6 * made.inner_steps + 9) / 2
    return 4 / 3 if combine == "implicit_surgery" else 1.0
