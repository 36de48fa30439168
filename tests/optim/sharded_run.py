"""A run of two processes with FSDP2 for test_sharded.py, started by torchrun.

Takes a folder and a rounding. The first run there writes a checkpoint of its middle, the whole
weights and states at its end to `end.pt`, and what a rank keeps to `kept.RANK.json`; where there
is a checkpoint, a run begins at it, and writes `again.RANKS.pt`.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unlearn_llm.optim import DualAdamWPlus, set_role

ROLES = ["forget", *["retain"] * 5, "forget", "retain"]
MIDDLE = 4
# Seven rows, of which two ranks get four and three; one row, of which they get one and none; a
# small parameter; rows that are not whole blocks; no rows at all.
SHAPES = {"odd": (7, 512), "one": (1, 2048), "small": (2, 256), "ragged": (6, 300), "flat": (1024,)}


class Model(torch.nn.Module):
    """A bag of parameters with given weights."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        for number, name in enumerate(names):
            shape = SHAPES[name]
            setattr(self, name, torch.nn.Parameter(drawn(shape, number)))


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    rounding: str, *, shard: bool = False, names: Iterable[str] = SHAPES, bits: int = 8
) -> tuple[Model, DualAdamWPlus]:
    """Make the model, sharded over the processes or whole, and its optimiser."""
    model = Model(names)
    if shard:
        fully_shard(model)
    options = {"state_bits": bits, "min_8bit_size": 1024, "rounding": rounding}
    return model, DualAdamWPlus(model.named_parameters(), lr=1e-2, max_update=10.0, **options)


def run(model: Model, optimizer: DualAdamWPlus, first: int, last: int) -> None:
    """Take the steps from `first` up to `last`, on gradients of their own."""
    for step in range(first, last):
        for number, param in enumerate(model.parameters()):
            grad = drawn(tuple(param.shape), 100 * (step + 1) + number)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        set_role(optimizer, ROLES[step])
        optimizer.step()


def whole(model: Model, optimizer: DualAdamWPlus) -> dict:
    """Give weights and states by name, gathered."""

    def gathered(value):
        value = value.detach() if isinstance(value, torch.Tensor) else value
        return value.full_tensor() if isinstance(value, DTensor) else value

    return {
        name: {
            "weight": gathered(param),
            **{key: gathered(value) for key, value in optimizer.state[param].items()},
        }
        for name, param in model.named_parameters()
    }


def checkpoint(model: Model, optimizer: DualAdamWPlus) -> dict:
    """Give what torch.distributed.checkpoint saves, or loads into."""
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optim": states}


def restore(model: Model, optimizer: DualAdamWPlus, folder: Path) -> None:
    """Load a distributed checkpoint."""
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )


def first_run(folder: Path, rounding: str) -> dict:
    """Run, save in the middle, go on."""
    model, optimizer = build(rounding, shard=True)
    run(model, optimizer, 0, MIDDLE)
    dcp.save(checkpoint(model, optimizer), checkpoint_id=folder / "checkpoint")
    run(model, optimizer, MIDDLE, len(ROLES))
    kept = {
        name: {
            key: [str(value.to_local().dtype), list(value.to_local().shape)]
            for key, value in optimizer.state[param].items()
            if isinstance(value, DTensor)
        }
        for name, param in model.named_parameters()
    }
    (folder / f"kept.{dist.get_rank()}.json").write_text(json.dumps(kept))
    gathered = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {"end": whole(model, optimizer), "gathered": gathered.get("state")}


def second_run(folder: Path, rounding: str) -> dict:
    """Begin at the checkpoint."""
    model, optimizer = build(rounding, shard=True)
    restore(model, optimizer, folder / "checkpoint")
    run(model, optimizer, MIDDLE, len(ROLES))
    return {f"again.{dist.get_world_size()}": whole(model, optimizer)}


def main() -> None:
    """Do the first run or a second one."""
    folder, rounding = Path(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    do = second_run if (folder / "checkpoint").exists() else first_run
    results = do(folder, rounding)
    if dist.get_rank() == 0:
        for name, result in results.items():
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
