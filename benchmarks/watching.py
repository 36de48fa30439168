"""What a training step costs: passes through the model, and vectors of the size of its weights."""

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import Trainer

from unlearn_llm.scoring import unwrapped


class Passes:
    """Counts the passes of a trainer, of its model and of a frozen copy of it.

    Attributes:
        counts: "forward" and "backward" with gradient, "without": forward without gradient.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.counts = {"forward": 0, "backward": 0, "without": 0}
        self._trainer = trainer
        self._kind = type(unwrapped(trainer.model))

    def __enter__(self) -> Self:
        accelerator = self._trainer.accelerator
        backward = accelerator.backward

        def counted(*given: Any, **keywords: Any) -> None:
            self.counts["backward"] += 1
            backward(*given, **keywords)

        accelerator.backward = counted
        self._hook = register_module_forward_pre_hook(self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        del self._trainer.accelerator.backward  # the class's own is there again
        self._hook.remove()

    def _forward(self, module: torch.nn.Module, _: object) -> None:
        if type(module) is self._kind:
            self.counts["forward" if torch.is_grad_enabled() else "without"] += 1


def live_vectors(trainer: Trainer) -> float:
    """Count the vectors of the size of the model that are alive, without weights and moments.

    Seen by tensors of the largest parameter's shape, so that few other tensors look like them.
    Another model of that shape in the same process must be gone: what only the collector would
    free, as a trainer before this one, is freed first.
    """
    gc.collect()
    parameters = list(trainer.model.parameters())
    shape = max(parameters, key=torch.Tensor.numel).shape
    own = {tensor.data_ptr() for tensor in (*parameters, *_moments(trainer))}
    found = {
        thing.data_ptr()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.shape == shape
    }
    alike = Counter(parameter.shape for parameter in parameters)[shape]
    return len(found - own) / alike


def state_vectors(trainer: Trainer) -> float:
    """Size of the optimiser's state, in bytes of the weights that train."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    return _bytes(_moments(trainer)) / _bytes(weights)


def _moments(trainer: Trainer) -> Iterator[torch.Tensor]:
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
