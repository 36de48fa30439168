"""What a dual optimiser needs to know of the model and of how it is spread over processes."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from unlearn_llm.optim import DualAdamW


def set_up(optimizer: Optimizer, model: nn.Module, *, quantize_embeddings: bool) -> None:
    """Prepare a dual optimiser for the Trainer; leave others alone.

    Embeddings keep float32 moments, as in the released code: most of their rows have no gradient
    in a step, so a block mixes very different magnitudes. Gradients need no second look, for the
    trainer refuses a norm that is not finite.

    Source: bitsandbytes GlobalOptimManager override, CityU-MLO/DualOptimPlus@b370724 trainer.
        Differs: no difference; a head tied to an embedding is the same tensor.
    """
    if not isinstance(optimizer, DualAdamW):
        return
    for group in list(optimizer.param_groups):
        group["refuse_nonfinite"] = False
        if group["state_bits"] == 8 and not quantize_embeddings:
            _keep_apart(optimizer, group, _embeddings(model))


def observations(optimizer: Any) -> dict[str, float]:
    """Give what the steps since the last call met, by role, as log entries."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(inner, DualAdamW):
        return {}
    return {
        f"{role}/{name}": value
        for role, seen in inner.drain_observations().items()
        for name, value in seen._asdict().items()
    }


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _keep_apart(optimizer: Optimizer, group: dict[str, Any], ids: set[int]) -> None:
    """Move parameters into a group of their own with float32 moments."""
    apart: list[Any] = [param for param in group["params"] if id(param) in ids]
    if not apart:
        return
    if len(apart) == len(group["params"]):
        group["state_bits"] = 32
        return
    settings = {
        name: value for name, value in group.items() if name not in ("params", "param_names")
    }
    if "param_names" in group:
        named = list(zip(group["param_names"], group["params"], strict=True))
        group["param_names"] = [name for name, param in named if id(param) not in ids]
        apart = [(name, param) for name, param in named if id(param) in ids]
    group["params"] = [param for param in group["params"] if id(param) not in ids]
    optimizer.add_param_group({**settings, "params": apart, "state_bits": 32})
