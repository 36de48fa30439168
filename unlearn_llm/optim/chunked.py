"""The step on any device, in torch: on cache-sized chunks, compiled where that pays.

A step written as a chain of tensor operations reads and writes memory once per operation. Here
every chunk stays in the cache for the whole chain (eager), or the chain is one loop (compiled).
Parameters too small to fill a chunk are joined, so that a thousand LoRA matrices take a few calls.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from unlearn_llm.optim.codec import (
    BLOCK,
    ZERO_CODE,
    dequantize,
    dequantize_by_lines,
    quantize,
    quantize_by_lines,
)
from unlearn_llm.optim.noise import counters, noise
from unlearn_llm.optim.task import Rule, Stored, Task
from unlearn_llm.optim.update import (
    Coefficients,
    Moments,
    Observed,
    dual_plus_update,
    dual_update,
)

CHUNK = 2**18
"""Entries of a chunk: 1 MiB for each float32 temporary."""
SMALL = 2**16
"""Parameters below this size are joined: copying them costs less than a call for each."""


def step(
    tasks: Sequence[Task], c: Coefficients, rule: Rule, *, compiled: bool = False
) -> Observed | None:
    """Update parameters that share coefficients, in place.

    Args:
        tasks: Parameters of one device, none of them empty.
        c: Floats.
        compiled: Use torch.compile; where it fails, warn once and go on without.

    Returns:
        What DualOptim+ met; None for DualOptim.
    """
    # Floats would be compiled in.
    numbers = torch.tensor(c, dtype=torch.float32) if compiled else None
    observed = []
    left_over: dict[Any, list[_Piece]] = {}
    for task in tasks:
        chunks, rest = _pieces(task, rule, compiled)
        observed += [_run(chunk, c, numbers, rule) for chunk in chunks]
        if rest is not None:
            left_over.setdefault(_layout(rest), []).append(rest)
    for alike in left_over.values():
        for bucket in _buckets(alike):
            joined = _join(bucket, compiled)
            observed.append(_run(joined, c, numbers, rule))
            _write_back(joined, bucket)
    met = [one for one in observed if one is not None]
    if not met:
        return None
    return Observed(
        torch.stack([one.negative for one in met]).sum(),
        torch.stack([one.largest for one in met]).amax(),
    )


# Pieces: chunks of a parameter where they lie, or copies of several small ones.


class _Piece(NamedTuple):
    """What one call steps: any number of floats, or whole blocks of codes."""

    param: Tensor
    grad: Tensor
    moments: Stored
    base: Stored | None
    counters: Tensor | None
    """For stochastic rounding."""


def _is_coded(task: Task | _Piece) -> bool:
    return any(pair is not None and pair.mean_scale is not None for pair in task[2:4])


def _layout(piece: _Piece) -> Any:
    """What pieces must have in common to be joined."""
    dtypes = [tensor.dtype for tensor in (piece.param, piece.grad, piece.moments.mean)]
    return *dtypes, None if piece.base is None else piece.base.mean.dtype


def _pieces(task: Task, rule: Rule, compiled: bool) -> tuple[list[_Piece], _Piece | None]:
    """Cut a parameter into whole chunks and what is left over, if anything."""
    entries = len(task.param)
    # Floats are compiled for any length; codes would not be vectorized for an unknown one.
    # Observing, compiled code keeps two temporaries of the length, so it gets chunks.
    at_once = compiled and not rule.observe and not _is_coded(task) and entries >= SMALL
    size = entries if at_once else CHUNK
    whole = entries - entries % size
    chunks = [_cut(task, start, start + size, rule) for start in range(0, whole, size)]
    return chunks, _cut(task, whole, entries, rule) if whole < entries else None


def _cut(task: Task, start: int, stop: int, rule: Rule) -> _Piece:
    """Take the entries from the first of a block; all tensors are views."""
    piece = _view(_Piece(*task[:4], counters=None), start, stop)
    if rule.stochastic and _is_coded(task):
        numbers = counters(task.noise_key, start, stop, task.param.device)
        return piece._replace(counters=numbers)
    return piece


def _view(piece: _Piece, start: int, stop: int) -> _Piece:
    blocks = slice(start // BLOCK, math.ceil(stop / BLOCK))

    def cut(pair: Stored) -> Stored:
        scales = (None if scale is None else scale[blocks] for scale in pair[2:])
        return Stored(pair.mean[start:stop], pair.square[start:stop], *scales)

    base = None if piece.base is None else cut(piece.base)
    return _Piece(
        piece.param[start:stop], piece.grad[start:stop], cut(piece.moments), base, counters=None
    )


def _buckets(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces so that no group is larger than a chunk."""
    bucket: list[_Piece] = []
    filled = 0
    for piece in pieces:
        size = BLOCK * math.ceil(len(piece.param) / BLOCK)
        if filled + size > CHUNK:
            yield bucket
            bucket, filled = [], 0
        bucket.append(piece)
        filled += size
    yield bucket


def _join(pieces: list[_Piece], compiled: bool) -> _Piece:
    """Copy pieces into one; codes are filled up to whole blocks, or to the compiled length."""
    coded = _is_coded(pieces[0])
    if len(pieces) == 1 and not coded:
        return pieces[0]
    lengths = [len(piece.param) for piece in pieces]
    fills = [-length % BLOCK if coded else 0 for length in lengths]
    if coded and compiled:
        fills[-1] += CHUNK - sum(lengths) - sum(fills)

    def join(tensors: Sequence[Any], value: int = 0) -> Tensor:
        pairs = zip(tensors, fills, strict=True)
        filled = [pad(x, (0, n), value=value) if n else x for x, n in pairs]
        return torch.cat(filled)

    def join_pairs(pairs: Sequence[Stored], signed_square: bool) -> Stored:
        means, squares, *scales = zip(*pairs, strict=True)
        if scales[0][0] is None:
            return Stored(join(means), join(squares))
        blocks = sum(lengths, sum(fills)) // BLOCK
        return Stored(
            join(means, ZERO_CODE[True]),
            join(squares, ZERO_CODE[signed_square]),
            *(pad(torch.cat(scale), (0, blocks - sum(map(len, scale)))) for scale in scales),
        )

    params, grads, moments, bases, draws = zip(*pieces, strict=True)
    return _Piece(
        join(params),
        join(grads),
        join_pairs(moments, bases[0] is not None),
        None if bases[0] is None else join_pairs(bases, False),
        None if draws[0] is None else join(draws),
    )


def _write_back(joined: _Piece, pieces: list[_Piece]) -> None:
    """Copy what the step changed to where the pieces came from."""
    if joined is pieces[0]:
        return
    start = 0
    for piece in pieces:
        part = _view(joined, start, start + len(piece.param))
        torch._foreach_copy_(_written(piece), _written(part))
        start += (
            BLOCK * math.ceil(len(piece.param) / BLOCK) if _is_coded(piece) else len(piece.param)
        )


def _written(piece: _Piece) -> list[Tensor]:
    tensors = [piece.param, *piece.moments, *(piece.base or ())]
    return [tensor for tensor in tensors if tensor is not None]


# One piece.


class _Codec(NamedTuple):
    quantize: Callable[..., tuple[Tensor, Tensor]]
    dequantize: Callable[..., Tensor]


_LOOKED_UP = _Codec(quantize, dequantize)
_COMPUTED = _Codec(quantize_by_lines, dequantize_by_lines)


def _run(piece: _Piece, c: Coefficients, numbers: Tensor | None, rule: Rule) -> Observed | None:
    """Step one piece, compiled where the coefficients are given as a tensor, too."""
    if _is_coded(piece):
        piece = _as_blocks(piece)
    if numbers is not None and not _failures and piece.moments.mean.dtype is not torch.float64:
        tensors, shape = _flattened(piece)
        try:
            return _compiled_step(rule, shape)(numbers, *tensors)
        except Exception as error:  # of many classes: no compiler, no headers, no memory
            _failures.append(error)
            warnings.warn(
                "torch.compile failed, so the optimizer goes on without it, which is slower: "
                f"{str(error).splitlines()[0]}",
                stacklevel=2,
            )
    return _step(piece, c, rule, _LOOKED_UP)


_failures: list[Exception] = []


@cache
def _compiled_step(rule: Rule, shape: tuple[bool, ...]) -> Callable[..., Observed | None]:
    def compilable(numbers: Tensor, *tensors: Tensor) -> Observed | None:
        piece = _unflattened(tensors, shape)
        return _step(piece, Coefficients(*numbers.unbind()), rule, _COMPUTED)

    # A copy, because torch counts recompilations by code object and gives up at the eighth.
    compilable.__code__ = compilable.__code__.replace()
    coded = shape[4] or shape[8]
    # For codes a product and a sum may be one instruction, as in every other compiler; floats are
    # rounded as in eager mode.
    fused: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    options = fused if coded else None
    return torch.compile(compilable, dynamic=not coded, fullgraph=True, options=options)


def _flattened(piece: _Piece) -> tuple[list[Tensor], tuple[bool, ...]]:
    """List the tensors, for a call checks the type of everything else; tell which there are."""
    nothing = (None,) * len(Stored._fields)
    fields = [*piece[:2], *piece.moments, *(piece.base or nothing), piece.counters]
    return [x for x in fields if x is not None], tuple(x is not None for x in fields)


def _unflattened(tensors: Sequence[Tensor], shape: tuple[bool, ...]) -> _Piece:
    rest = iter(tensors)
    fields: list[Any] = [next(rest) if there else None for there in shape]
    param, grad, *moments = fields[:6]
    base = Stored(*fields[6:10]) if shape[6] else None
    return _Piece(param, grad, Stored(*moments), base, fields[10])


def _step(piece: _Piece, c: Coefficients, rule: Rule, codec: _Codec) -> Observed | None:
    moments = _load(piece.moments, piece.base is not None, codec)
    # The parameter and the gradient themselves, unless they are bfloat16 or float16.
    param, grad = piece.param.to(moments.mean.dtype), piece.grad.to(moments.mean.dtype)
    observed = base = None
    if piece.base is None:
        dual_update(param, grad, moments, c)
    else:
        base = _load(piece.base, False, codec)
        observed = dual_plus_update(
            param,
            grad,
            base,
            moments,
            c,
            base_order=rule.base_order,
            max_update=rule.max_update,
            observe=rule.observe,
        )
    if param is not piece.param:
        piece.param.copy_(param)
    draws: Sequence[Tensor | None] = [None] * 4
    if piece.counters is not None:
        draws = noise(piece.counters)
    _save(piece.moments, moments, piece.base is not None, draws[:2], codec)
    if piece.base is not None and base is not None:
        _save(piece.base, base, False, draws[2:], codec)
    return observed


def _load(pair: Stored, signed_square: bool, codec: _Codec) -> Moments:
    """Give the moments as floats: the stored ones themselves, or decoded."""
    if pair.mean_scale is None or pair.square_scale is None:
        return Moments(pair.mean, pair.square)
    return Moments(
        codec.dequantize(pair.mean, pair.mean_scale, True),
        codec.dequantize(pair.square, pair.square_scale, signed_square),
    )


def _save(
    pair: Stored,
    moments: Moments,
    signed_square: bool,
    draws: Sequence[Tensor | None],
    codec: _Codec,
) -> None:
    """Encode moments into their place; floats were changed there."""
    if pair.mean_scale is None or pair.square_scale is None:
        return
    both = (pair.mean, pair.mean_scale, True), (pair.square, pair.square_scale, signed_square)
    for values, draw, (codes, scale, signed) in zip(moments, draws, both, strict=True):
        new_codes, new_scale = codec.quantize(values, signed, draw)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def _as_blocks(piece: _Piece) -> _Piece:
    """View a piece of codes as (blocks, BLOCK), and its scales as (blocks, 1).

    All tensors and before compiling, or the loops over blocks and over entries are not fused.
    """

    def blocks(pair: Stored) -> Stored:
        scales = (None if scale is None else scale.view(-1, 1) for scale in pair[2:])
        return Stored(pair.mean.view(-1, BLOCK), pair.square.view(-1, BLOCK), *scales)

    return _Piece(
        piece.param.view(-1, BLOCK),
        piece.grad.view(-1, BLOCK),
        blocks(piece.moments),
        None if piece.base is None else blocks(piece.base),
        None if piece.counters is None else piece.counters.view(-1, BLOCK),
    )
