"""Watch what tensors a piece of code makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


class MadeLike(TorchDispatchMode):
    """Counts the pieces of memory for tensors of a given tensor's shape, without its own."""

    def __init__(self, given):
        super().__init__()
        self.given, self.seen = given, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.given.shape:
            self.seen.append(result)  # kept alive, so that no address is given twice
        return result

    @property
    def count(self):
        addresses = {tensor.untyped_storage().data_ptr() for tensor in self.seen}
        return len(addresses - {self.given.untyped_storage().data_ptr()})


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes, views of the `given` ones left out."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in self.given:
                self.made = max(self.made, storage.nbytes() // result.itemsize)
        return result
