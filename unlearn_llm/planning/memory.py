"""Memory of one process, by what it is for, and how an engine divides it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from unlearn_llm.planning.simulation import Cost

Engine = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
SHARDED: tuple[Engine, ...] = ("fsdp2", "zero3")
"""Engines that divide the weights, too."""
ENGINES: tuple[Engine, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
FLOAT = 4
GATHERED = 2
"""Layers whose weights are whole at one moment: the one at work and the one that comes."""


class Weights(NamedTuple):
    """Bytes of a model.

    Attributes:
        all: Weights and buffers, in the dtypes they train in.
        trained: Of them, what trains.
        layer, rest: Of a decoder layer, and outside of the layers.
    """

    all: int
    trained: int
    layer: int
    rest: int
    entries: int
    trained_entries: int


def weights_of(model: nn.Module, layers: int) -> Weights:
    """Count a model's weights; what is tied counts once."""
    parameters = list(model.parameters())
    whole = sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    in_blocks = [
        sum(p.nbytes for p in block.parameters()) for block in (blocks[0] if blocks else ())
    ]
    return Weights(
        whole,
        sum(p.nbytes for p in trained),
        max(in_blocks, default=0),
        whole - sum(in_blocks),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
    )


@dataclass(frozen=True)
class Held:
    """Bytes that stay from step to step, of a single process.

    Attributes:
        reference: A frozen copy of the model.
        vectors: What a combination keeps between passes, if any with the gradients of the first.
        mask: One byte per entry that trains.
    """

    weights: Weights
    states: float
    reference: int = 0
    vectors: int = 0
    mask: int = 0

    @property
    def gradients(self) -> int:
        """Gradients are in the dtype of what they belong to."""
        return self.weights.trained


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        parts: By what they are for, each at its most.
        peak: At the worst moment, which is less than their sum: gradients come while activations
            go. Without what driver and libraries take.
        moment: Which moment that is.
    """

    parts: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0
    moment: str = ""


def memory(held: Held, cost: Cost, engine: Engine | None, ranks: int) -> Memory:
    """Add up the memory of one process.

    Args:
        cost: Of the micro-batch that takes most.
        engine: None: there is one process.
    """
    w = held.weights
    sharded = engine in SHARDED
    shards = ranks if engine is not None else 1
    parts = {
        "weights": w.all / (shards if sharded else 1),
        "gradients": held.gradients / (shards if sharded or engine == "zero2" else 1),
        "optimiser states": held.states / (1 if engine in (None, "ddp") else shards),
        "reference": float(held.reference),
        "combination": held.vectors / (shards if sharded else 1),
        "mask": float(held.mask),
        "engine": _of_engine(held, engine, shards),
        "activations": float(cost.activations),
        "logits": float(cost.logits),
        "temporaries": float(max(0, cost.without_gradients - cost.activations - cost.logits)),
    }
    passing = ("gradients", "activations", "logits", "temporaries")
    stays = sum(size for name, size in parts.items() if name not in passing)
    # The gradients of the first pass are there in the second only, as `cost` knows.
    backward = stays + cost.peak - min(held.vectors, held.gradients)
    if parts["gradients"] < held.gradients:  # spread, they are never whole
        backward = stays + cost.without_gradients + parts["gradients"]
    # A mask puts held entries back after the step, from a copy.
    step = stays + parts["gradients"] + (held.gradients if held.mask else 0)
    moments = {"backward pass": backward, "optimiser step": step}
    moment = max(moments, key=lambda name: moments[name])
    return Memory(parts, moments[moment], moment)


def _of_engine(held: Held, engine: Engine | None, ranks: int) -> float:
    """What an engine takes for itself; of ZeRO and FSDP2 as documented, not measured."""
    w = held.weights
    if engine == "ddp":  # buckets of all gradients
        return float(held.gradients)
    if engine == "fsdp2":  # whole layers, their gradients before they are reduced, and the rest
        return GATHERED * w.layer + w.layer + w.rest
    if engine is None:
        return 0.0
    masters = FLOAT * w.trained_entries / ranks  # ZeRO steps a flat copy of its shard
    return masters + (GATHERED * w.layer + w.layer + w.rest if engine == "zero3" else 0.0)
