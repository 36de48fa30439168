"""Bytes that an optimiser keeps for each parameter, by its name and its bits."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from unlearn_llm.optim import OPTIMIZERS, DualAdamW, DualAdamWPlus
from unlearn_llm.optim.codec import BLOCK

MOMENTS = 2
"""First and second, of each role or of the base."""
BNB_SMALLEST = 4096
"""Parameters with fewer entries stay in 32 bits in bitsandbytes, and embeddings do."""
FLOAT, CODE = 4, 1 + 4 / BLOCK
"""Bytes of an entry in 32 bits, and in 8 bits with its share of a scale."""

# The Trainer's own `optim`: moments in 32 bits (or none), and in 8 bits.
THIRTY_TWO = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "paged_adamw_32bit": 2, "adagrad": 1, "sgd": 0,
    "lion_32bit": 1, "paged_lion_32bit": 1, "rmsprop": 1, "ademamix": 3, "paged_ademamix_32bit": 3,
}  # fmt: skip
EIGHT = {
    "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1,
    "paged_lion_8bit": 1, "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
}  # fmt: skip


class States(NamedTuple):
    """What an optimiser keeps.

    Attributes:
        kept: Bytes.
        touched: Bytes that one step reads and writes; the moments of the other role rest.
        name: For people.
        note: What was assumed, if anything.
    """

    kept: float
    touched: float
    name: str
    note: str | None = None


def states_of(
    model: nn.Module,
    *,
    optimizer: str | None,
    parameters: Mapping[str, Any],
    optim: str,
    quantize_embeddings: bool = False,
) -> States:
    """Count the states of the parameters that train.

    Args:
        optimizer: Of UnlearnConfig; None: the Trainer's `optim`.
        parameters: optimizer_parameters.
        optim: Of TrainingArguments.
    """
    trained = {p: p.numel() for p in model.parameters() if p.requires_grad}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    if optimizer is None:
        return _of_trainer(optim, trained, embeddings)
    cls = OPTIMIZERS[optimizer]
    if not issubclass(cls, DualAdamW):
        guess = MOMENTS * FLOAT * sum(trained.values())
        note = f"states of {optimizer} are not known: 8 bytes per parameter are assumed"
        return States(guess, guess, optimizer, note)
    bits = parameters.get("state_bits", 32)
    apart = set() if quantize_embeddings else embeddings
    smallest = parameters.get("min_8bit_size", 4096)
    in_codes = sum(n for p, n in trained.items() if n >= smallest and p not in apart)
    in_codes = in_codes if bits == 8 else 0
    rest = sum(trained.values()) - in_codes
    plus, quantize = issubclass(cls, DualAdamWPlus), parameters.get("quantize", "all")
    role = _pair(rest, in_codes, quantize in ("all", "delta"))
    base = _pair(rest, in_codes, quantize in ("all", "base")) if plus else 0.0
    return States(2 * role + base, role + base, f"{optimizer}, {bits} bits")


def _pair(rest: int, in_codes: int, quantized: bool) -> float:
    """Two moments of all entries."""
    return MOMENTS * (FLOAT * rest + (CODE if quantized else FLOAT) * in_codes)


def _of_trainer(optim: str, trained: Mapping[Any, int], embeddings: set[Any]) -> States:
    entries = sum(trained.values())
    if optim == "adafactor":  # rows and columns of matrices, whole vectors
        factors = float(FLOAT * sum(_factored(p.shape) for p in trained))
        return States(factors, factors, optim)
    if optim in EIGHT:
        whole = sum(n for p, n in trained.items() if n < BNB_SMALLEST or p in embeddings)
        codes = EIGHT[optim] * (FLOAT * whole + CODE * (entries - whole))
        return States(codes, codes, optim)
    note = None
    if optim not in THIRTY_TWO:
        note = f"states of optim: {optim} are not known: 8 bytes per parameter are assumed"
    kept = float(THIRTY_TWO.get(optim, MOMENTS) * FLOAT * entries)
    return States(kept, kept, optim, note)


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return sum(shape)
    *outer, rows, columns = shape
    return math.prod(outer) * (rows + columns)
