"""How moments are kept between steps: in float32, or in 8 bits; whole, or one shard per rank.

The state of a parameter is a flat dict of tensors and counters, so that it saves, loads under
`weights_only=True` and reshards like the state of torch's own optimisers. A moment in 8 bits is
two tensors: `forget_mean` holds codes of the parameter's shape, `forget_mean_scale` their scales.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from unlearn_llm.optim.codec import BLOCK
from unlearn_llm.optim.task import Stored
from unlearn_llm.optim.update import Moments

SCALE = "_scale"


def moment_names(*owners: str) -> list[str]:
    """Name the two moments of each role, or of the base."""
    return [f"{owner}_{moment}" for owner in owners for moment in Moments._fields]


def can_quantize(param: Tensor, min_size: int) -> bool:
    """Tell whether a parameter's moments may be kept in 8 bits.

    Small ones stay in float32, and so do float64 ones. Under FSDP2 every row must be made of
    whole blocks: then blocks never cross ranks, and a checkpoint loads on any number of them.

    Args:
        param: (*) a tensor, or a DTensor; its whole size counts, not the shard's.
        min_size: Entries below which a parameter counts as small.

    Source: bitsandbytes optimizer.py, min_8bit_size. Differs: there the shard's size counts, so
        the layout depends on the number of ranks.
    """
    if param.numel() < min_size or _float(param) is not torch.float32:
        return False
    if not isinstance(param, DTensor):
        return True
    by_rows = all(placement in (Replicate(), Shard(0)) for placement in param.placements)
    whole_rows = param.dim() > 1 and _row(param) % BLOCK == 0
    return by_rows and param.placements.count(Shard(0)) <= 1 and whole_rows


def allocate(param: Tensor, owner: str, quantized: bool) -> dict[str, Tensor]:
    """Make the two moments of a role or of the base, all zero.

    In 8 bits the codes are zero too: with a scale of zero every code means zero.
    """
    dtype = torch.uint8 if quantized else _float(param)
    state = {}
    for name in moment_names(owner):
        state[name] = _zeros(param, tuple(param.shape), dtype)
        if quantized:
            state[name + SCALE] = _zeros(param, _scale_shape(param), torch.float32)
    return state


def stored(state: dict[str, Any], owner: str) -> Stored:
    """Find the two moments of a role or of the base, as a kernel takes them."""
    mean, square = moment_names(owner)
    tensors = [state.get(name) for name in (mean, square, mean + SCALE, square + SCALE)]
    return Stored(*(None if tensor is None else local(tensor).view(-1) for tensor in tensors))  # type: ignore[arg-type]


def local(tensor: Tensor) -> Tensor:
    """Give this rank's shard of a DTensor, sharing memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_entry(param: Tensor) -> int:
    """Count the entries of a parameter before those of this rank, where it is sharded by rows."""
    if isinstance(param, DTensor) and Shard(0) in param.placements:
        dim = param.placements.index(Shard(0))
        rows = math.ceil(len(param) / param.device_mesh.size(dim))
        return min(rows * param.device_mesh.get_local_rank(dim), len(param)) * _row(param)
    return 0


def is_moment_state(saved: dict[str, Any], owners: Sequence[str], counters: Sequence[str]) -> bool:
    """Tell whether a saved state has the moments of these owners, in either width."""
    names = moment_names(*owners)
    scales = {name + SCALE for name in names}
    return {*names, *counters} <= saved.keys() <= {*names, *counters, *scales}


def _float(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _row(param: Tensor) -> int:
    return math.prod(param.shape[1:])


def _scale_shape(param: Tensor) -> tuple[int, ...]:
    """One scale per block; rows where they are whole blocks, so that shards of rows match."""
    if param.dim() > 1 and _row(param) % BLOCK == 0:
        return (param.shape[0], _row(param) // BLOCK)
    return (math.ceil(param.numel() / BLOCK),)


def _zeros(param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(param, DTensor):
        return sharded_zeros(
            shape, dtype=dtype, device_mesh=param.device_mesh, placements=param.placements
        )
    return torch.zeros(shape, dtype=dtype, device=param.device)
