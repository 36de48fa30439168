"""The step of `update` as one Triton kernel: every byte is read once and written once.

All parameters of a list that are stored alike share one launch: the kernel finds their tensors in
a table of addresses. Decoding, the update and encoding happen in registers, in float32.

Needs Triton. Interpreted (TRITON_INTERPRET=1), the kernel takes CPU tensors.
"""

# The values of a kernel have types of Triton's own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_llm.optim import codec
from unlearn_llm.optim.task import Rule, Task
from unlearn_llm.optim.triton_codec import ZERO, draw, encode, reciprocal, root
from unlearn_llm.optim.update import Coefficients, Observed

BLOCK = tl.constexpr(codec.BLOCK)
HALF = tl.constexpr(codec.BLOCK // 2)
SPAN = tl.constexpr(16 * codec.BLOCK)
"""Entries per program, one block after the other. A program is one warp: its lanes agree on the
largest magnitude of a block without waiting for other warps."""
STRIDE = tl.constexpr(64)
"""The parameter of every STRIDE-th program is written down; the others count on from it."""
SLOTS = tl.constexpr(256)
"""Places for what programs observe, so that few of them write to the same one."""

SIZE = tl.constexpr(10)
FIRST = tl.constexpr(11)
COLUMNS = tl.constexpr(12)
"""The table of addresses has the fields of `_Row` and then the parameter's first program."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNMENT = 16


class _Row(NamedTuple):
    """One parameter: addresses, 0 where there is no tensor, and the number of entries."""

    param: int
    grad: int
    mean: int
    square: int
    base_mean: int
    base_square: int
    mean_scale: int
    square_scale: int
    base_mean_scale: int
    base_square_scale: int
    size: int


class _Layout(NamedTuple):
    """What a kernel is built for."""

    param: torch.dtype
    grad: torch.dtype
    coded: bool
    """Whether the moments are kept in 8 bits."""
    base: bool
    base_coded: bool
    even: bool
    """Whole blocks only, and aligned. Else every entry is checked and read by itself."""


class _Table(NamedTuple):
    rows: Tensor
    """(parameters + 1, COLUMNS) int64; the last row has only the number of programs."""
    starts: Tensor
    """(ceil(programs / STRIDE),) int32, the parameter of every STRIDE-th program."""
    programs: int


def step(tasks: Sequence[Task], coefficients: Coefficients, rule: Rule) -> Observed | None:
    """Take one step of several parameters, in place, with one launch per layout.

    Args:
        tasks: On one device, float32, bfloat16 or float16, all with a base or all without.
        coefficients: Of all tasks.

    Returns:
        What DualOptim+ met, if the rule asks for it. Steps that are not a number are not seen.

    Source: `update.dual_plus_update` and `update.dual_update`, with `codec` and `noise`. Differs:
        moments are averaged without the second formula that torch's lerp has for weights from
        1/2; square roots and quotients are exact to a few units in the last place, and codes
        up to values as close as that to the middle between two.
    """
    if not tasks:
        return None
    layouts: dict[_Layout, list[tuple[_Row, int]]] = defaultdict(list)
    for task in tasks:
        if task.param.numel() > 0:
            row = _row(task)
            layouts[_layout(task, row)].append((row, task.noise_key))
    device = tasks[0].param.device
    slots = None
    if rule.observe and tasks[0].base is not None:
        slots = torch.zeros(2, SLOTS.value, dtype=torch.int32, device=device)
    with torch.cuda.device_of(tasks[0].param):
        for layout, entries in layouts.items():
            rows, keys = zip(*entries, strict=True)
            _launch(layout, rows, keys, coefficients, rule, slots, device)
    return (
        Observed(slots[0].sum(), slots[1].view(torch.float32).max()) if slots is not None else None
    )


def _row(task: Task) -> _Row:
    base = (None,) * 4 if task.base is None else task.base
    tensors = task.param, task.grad, *task.moments[:2], *base[:2], *task.moments[2:], *base[2:]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _Row._make([*addresses, task.param.numel()])


def _layout(task: Task, row: _Row) -> _Layout:
    return _Layout(
        task.param.dtype,
        task.grad.dtype,
        task.moments.mean_scale is not None,
        task.base is not None,
        task.base is not None and task.base.mean_scale is not None,
        row.size % codec.BLOCK == 0
        and all(address % _ALIGNMENT == 0 for address in row[: SIZE.value]),
    )


def _launch(
    layout: _Layout,
    rows: tuple[_Row, ...],
    keys: tuple[int, ...],
    coefficients: Coefficients,
    rule: Rule,
    slots: Tensor | None,
    device: torch.device,
) -> None:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = _table(rows, device, stream)
    stochastic = rule.stochastic and (layout.coded or layout.base_coded)
    _kernel[(table.programs,)](
        table.rows,
        table.starts,
        _moved(torch.tensor(keys, dtype=torch.int32), device) if stochastic else None,
        codec.table(True, device),
        codec.table(False, device),
        slots,
        # Floats, all of them: an int would be compiled in, and a new one be compiled anew.
        *(float(number) for number in coefficients),
        PARAM=_TYPES[layout.param],
        GRAD=_TYPES[layout.grad],
        CODED=layout.coded,
        BASE=layout.base,
        BASE_CODED=layout.base_coded,
        BASE_FIRST=rule.base_order == "base_first",
        BOUND=rule.max_update if layout.base else None,
        STOCHASTIC=stochastic,
        OBSERVE=slots is not None,
        EVEN=layout.even,
        PTX=isinstance(_kernel, triton.JITFunction) and torch.version.hip is None,
        num_warps=1,
        enable_fp_fusion=True,
    )


@lru_cache(maxsize=32)
def _table(rows: tuple[_Row, ...], device: torch.device, stream: int) -> _Table:
    """Put rows on the device; kept, for the tensors of a role mostly stay where they are.

    Args:
        stream: The one that copies. Another one would not wait for the copy.
    """
    programs = torch.tensor([-(-row.size // SPAN.value) for row in rows])
    ends = programs.cumsum(0)
    table = torch.zeros(len(rows) + 1, COLUMNS.value, dtype=torch.int64)
    table[:-1, : FIRST.value] = torch.tensor(rows)
    table[1:, FIRST.value] = ends
    total = int(ends[-1])
    starts = torch.searchsorted(ends, torch.arange(0, total, STRIDE.value), right=True)
    return _Table(_moved(table, device), _moved(starts.int(), device), total)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, or the host would wait until the device has done all it was given.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _kernel(
    table,
    starts,
    keys,
    signed_values,
    unsigned_values,
    slots,
    lr,
    decay,
    eps,
    mean_weight,
    square_weight,
    mean_correction,
    square_correction,
    base_mean_weight,
    base_square_weight,
    base_mean_correction,
    base_square_correction,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CODED: tl.constexpr,
    BASE: tl.constexpr,
    BASE_CODED: tl.constexpr,
    BASE_FIRST: tl.constexpr,
    BOUND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    OBSERVE: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Step SPAN entries of one parameter. After the tables: the fields of Coefficients."""
    program = tl.program_id(0)
    tensor = tl.load(starts + program // STRIDE)
    while tl.load(table + (tensor + 1) * COLUMNS + FIRST) <= program:
        tensor += 1
    row = table + tensor * COLUMNS
    first = (program - tl.load(row + FIRST)) * SPAN
    left = tl.minimum(tl.load(row + SIZE) - first, SPAN).to(tl.int32)
    key = tl.load(keys + tensor).to(tl.uint32, bitcast=True) if STOCHASTIC else 0

    param_at = _at(row, 0, first, PARAM, EVEN)
    grad_at = _at(row, 1, first, GRAD, EVEN)
    mean_at = _stored_at(row, 2, first, CODED, EVEN)
    square_at = _stored_at(row, 3, first, CODED, EVEN)
    base_mean_at = _stored_at(row, 4, first, BASE_CODED, EVEN)
    base_square_at = _stored_at(row, 5, first, BASE_CODED, EVEN)
    square_values = signed_values if BASE else unsigned_values

    in_block = tl.arange(0, 2)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    negative = tl.zeros([2, HALF], tl.int32)
    largest = tl.zeros([2, HALF], tl.float32)
    for block in range(tl.cdiv(left, BLOCK)):
        at = block * BLOCK + in_block
        inside = None if EVEN else at < left
        param = _load(param_at + at, inside, 0.0)
        grad = _load(grad_at + at, inside, 0.0).to(tl.float32)
        grad_square = grad * grad
        mean = _read(mean_at, at, block, inside, signed_values, CODED, True)
        square = _read(square_at, at, block, inside, square_values, CODED, BASE)
        if BASE:
            base_mean = _read(base_mean_at, at, block, inside, signed_values, BASE_CODED, True)
            base_square = _read(
                base_square_at, at, block, inside, unsigned_values, BASE_CODED, False
            )
            new_base_mean = base_mean + (grad - base_mean) * base_mean_weight
            new_base_square = base_square + (grad_square - base_square) * base_square_weight
            shared_mean = (new_base_mean if BASE_FIRST else base_mean) * base_mean_correction
            shared_square = (
                new_base_square if BASE_FIRST else base_square
            ) * base_square_correction
            mean += (grad - shared_mean - mean) * mean_weight
            square += (grad_square - shared_square - square) * square_weight
            direction = mean * mean_correction + shared_mean
            power = square * square_correction + shared_square
            if OBSERVE:
                negative += (power < 0).to(tl.int32)
        else:
            mean += (grad - mean) * mean_weight
            square += (grad_square - square) * square_weight
            direction = mean * mean_correction
            power = square * square_correction
        update = direction * reciprocal(root(tl.abs(power), PTX) + eps, PTX)
        if OBSERVE:
            seen = update if EVEN else tl.where(inside, update, 0.0)
            largest = tl.maximum(largest, tl.abs(seen))
        if BOUND is not None:
            update = tl.minimum(tl.maximum(update, -BOUND), BOUND)
        changed = param.to(tl.float32) * decay - update * lr
        tl.store(param_at + at, changed.to(PARAM), mask=inside)
        noise = draw(first.to(tl.uint32) + at.to(tl.uint32), key) if STOCHASTIC else (0, 0, 0, 0)
        _write(mean_at, at, block, inside, mean, CODED, True, noise[0], STOCHASTIC, PTX)
        _write(square_at, at, block, inside, square, CODED, BASE, noise[1], STOCHASTIC, PTX)
        if BASE:
            _write(
                base_mean_at,
                at,
                block,
                inside,
                new_base_mean,
                BASE_CODED,
                True,
                noise[2],
                STOCHASTIC,
                PTX,
            )
            _write(
                base_square_at,
                at,
                block,
                inside,
                new_base_square,
                BASE_CODED,
                False,
                noise[3],
                STOCHASTIC,
                PTX,
            )
    if OBSERVE:
        slot = slots + program % SLOTS
        tl.atomic_add(slot, tl.sum(negative), sem="relaxed")
        # Of numbers from zero up, the bits are in the order of the numbers.
        tl.atomic_max(slot + SLOTS, tl.max(largest).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _at(row, COLUMN: tl.constexpr, offset, DTYPE: tl.constexpr, EVEN: tl.constexpr):
    address = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    # Four entries per access, whatever their type, so that all tensors are split over the warp
    # in the same way.
    return (tl.multiple_of(address, DTYPE.primitive_bitwidth // 2) if EVEN else address) + offset


@triton.jit
def _stored_at(row, COLUMN: tl.constexpr, offset, CODED: tl.constexpr, EVEN: tl.constexpr):
    """Find the numbers and their scales, four columns on."""
    return (
        _at(row, COLUMN, offset, tl.uint8 if CODED else tl.float32, EVEN),
        _at(row, COLUMN + 4, offset // BLOCK, tl.float32, False),
    )


@triton.jit
def _load(pointers, inside, outside):
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=outside)


@triton.jit
def _read(stored_at, at, block, inside, values, CODED: tl.constexpr, SIGNED: tl.constexpr):
    if CODED:
        code = _load(stored_at[0] + at, inside, ZERO if SIGNED else 0)
        return tl.load(values + code.to(tl.int32)) * tl.load(stored_at[1] + block)
    else:
        return _load(stored_at[0] + at, inside, 0.0)


@triton.jit
def _write(
    stored_at,
    at,
    block,
    inside,
    numbers,
    CODED: tl.constexpr,
    SIGNED: tl.constexpr,
    noise,
    STOCHASTIC: tl.constexpr,
    PTX: tl.constexpr,
):
    if CODED:
        scale = tl.max(tl.abs(numbers))
        tl.store(stored_at[1] + block, scale)
        numbers = encode(numbers, scale, SIGNED, noise, STOCHASTIC, PTX)
    tl.store(stored_at[0] + at, numbers, mask=inside)
