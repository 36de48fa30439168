"""Hidden states of chosen decoder layers, for the losses that read them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_llm.errors import UserError


@contextmanager
def captured(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect what decoder layers put out in the last forward pass, by layer (B, T, H).

    Args:
        model: The transformers model itself; the call may go through its wrappers (DDP, peft).
        layers: From 0, the first. A layer's output comes before any norm that follows the last.
    """
    states: dict[int, Tensor] = {}
    blocks = _decoder_layers(model) if layers else nn.ModuleList()
    hooks = [blocks[layer].register_forward_hook(_keeper(states, layer)) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def reach_every_weight(states: Mapping[int, Tensor], model: nn.Module) -> dict[int, Tensor]:
    """Let weights above a hidden state have a gradient of zero instead of none.

    DDP waits for the gradient of every weight, and one process must do what several do.

    Raises:
        UserError: no gradient would leave a hidden state.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (states and weights and torch.is_grad_enabled()):
        return dict(states)
    for layer, state in states.items():
        if not state.requires_grad:
            raise UserError(
                f"No weight up to layer {layer} trains, so its hidden states cannot change. Choose "
                "higher layers, or other weights (`trainable`)."
            )
    zero = 0 * torch.stack([weight.sum() for weight in weights]).sum()
    return {layer: state + zero.to(state.dtype) for layer, state in states.items()}


def check_layers(model: Any, layers: Sequence[int], loss: str) -> None:
    """Refuse layers that the model does not have.

    Raises:
        UserError: naming the loss.
    """
    count = len(_decoder_layers(model)) if layers else 0
    for layer in layers:
        if layer not in range(count):
            raise UserError(f"{loss}: layers: expected numbers of 0 to {count - 1}, got {layer!r}.")


def _decoder_layers(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} layers to read.")


def _keeper(states: dict[int, Tensor], layer: int) -> Any:
    def keep(block: nn.Module, args: Any, output: Any) -> None:
        states[layer] = output[0] if isinstance(output, tuple) else output

    return keep
