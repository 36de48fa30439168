"""A key-value cache with room to grow: what `generate` needs to be quick in large batches.

transformers' DynamicCache copies all keys and values at every new token (four fifths of the time
of a small model on a CPU); its StaticCache attends to every place that will ever be filled.
"""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

STEP = 32
"""The buffers grow by at least so many tokens at a time."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (batch, heads, tokens, size) views of larger buffers."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[..., :0, :], value_states[..., :0, :]]
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        for index, states in enumerate((key_states, value_states)):
            if self._buffers[index].shape[-2] < total:
                self._buffers[index] = _larger(self._buffers[index], seen, total)
            self._buffers[index][..., seen:total, :] = states
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch only."""
        self._buffers = [buffer[indices] for buffer in self._buffers]
        seen = self.get_seq_length()
        self.keys, self.values = (buffer[..., :seen, :] for buffer in self._buffers)


def _larger(buffer: torch.Tensor, seen: int, total: int) -> torch.Tensor:
    room = total + max(STEP, total // 4)
    larger = buffer.new_empty(*buffer.shape[:-2], room, buffer.shape[-1])
    larger[..., :seen, :] = buffer[..., :seen, :]
    return larger


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """Make the cache of this model; layers of a special kind (sliding windows) stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
