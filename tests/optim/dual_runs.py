"""Small runs of the dual optimisers on given gradients."""

import torch

from unlearn_llm.optim import DualAdamW, DualAdamWPlus, set_role

CLASSES = [DualAdamW, DualAdamWPlus]
ONE_TO_FIVE = ["forget", *["retain"] * 5]


def train(optimizer, params, roles, grads):
    """Feed one given gradient per step to every parameter."""
    for role, grad in zip(roles, grads, strict=True):
        set_role(optimizer, role)
        for param in params:
            param.grad = grad.to(param.dtype)
        optimizer.step()


def random_grads(steps, shape=(7,), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


def make(optimizer_class, dtype=torch.float64, **options):
    start = torch.linspace(-1, 1, 7, dtype=torch.float64).to(dtype)
    param = torch.nn.Parameter(start)
    return optimizer_class([param], lr=1e-2, **options), param
