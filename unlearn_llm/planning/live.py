"""Counts the bytes that are alive while a model runs on tensors without contents."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Live(TorchDispatchMode):
    """Sees every operation: what it allocates, when that is freed, what it computes.

    Works on storages, so that views cost nothing, and on any tensor: with torch's fake tensors
    nothing is allocated and nothing computed.

    Attributes:
        now: Bytes alive, without those that were there before.
        gradients: Bytes of them that are gradients of parameters.
        peak: Most of `now` so far.
        peak_without_gradients: Most of `now - gradients` so far.
        flops: Of matrix products and attention so far.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        """Start to count.

        Args:
            before: Tensors that are there already, such as parameters. Those that want a gradient
                are watched for it.
        """
        super().__init__()
        self.now = self.gradients = self.peak = self.peak_without_gradients = self.flops = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._gradients: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ends: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._shapes: set[torch.Size] = set()
        self._kept = []
        self._marked = self._since = 0
        for tensor in before:
            storage = tensor.untyped_storage()
            self._known.add(storage)
            self._kept.append(storage)
            if tensor.requires_grad and tensor.is_leaf:
                self._shapes.add(tensor.shape)
                tensor.register_post_accumulate_grad_hook(self._is_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation and look at what came of it."""
        result = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, result)
        if func._overloadpacket is torch.ops.aten.add and self._adds_up_gradients(args[0]):
            self._is_overwritten(args[0])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def mark(self) -> None:
        """Look at the peak from here on, too; see `above_mark`."""
        self._marked = self._since = self.now

    def above_mark(self) -> int:
        """Give the most bytes since the mark, beyond those that were there."""
        return self._since - self._marked

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self._ends[storage] = weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        self._since = max(self._since, self.now)
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)

    def _adds_up_gradients(self, tensor: Tensor) -> bool:
        """Is this the second gradient of a tied weight, in a backward pass?"""
        return tensor.shape in self._shapes and torch._C._current_graph_task_id() != -1

    def _is_overwritten(self, tensor: Tensor) -> None:
        """Let what is made of a tensor take its place, as autograd does with other than fakes."""
        end = self._ends.pop(tensor.untyped_storage(), None)
        if end is not None and end.detach():
            self.now -= tensor.untyped_storage().nbytes()

    def _gone(self, n_bytes: int) -> None:
        self.now -= n_bytes

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage not in self._gradients:
            self._gradients.add(storage)
            self.gradients += storage.nbytes()
            weakref.finalize(storage, self._no_gradient, storage.nbytes())

    def _no_gradient(self, n_bytes: int) -> None:
        self.gradients -= n_bytes


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    if packet is ATTENTION:  # which torch's table leaves out
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0
