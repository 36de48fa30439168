"""Steps of combinations on a small network, for test_sharded.py: FSDP2 where ranks are started.

Takes a file name; rank 0 writes the weights after three steps of each combination to it.
"""

import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unlearn_llm.combine import COMBINATIONS, Step
from unlearn_llm.combining import Combining

RUNS = {
    "surgery": {},
    "pcgrad": {},
    "mgda": {},
    "ngdiff": {"probe_every": 1},
    "blur": {},
    "ofmu": {"inner_steps": 2, "inner_rate": 0.01, "rho": 0.1},
    "implicit_surgery": {"rate": 0.1, "initial": 0.5},
}


class Steps(Combining):
    """The trainer's window, on two losses of a network instead of an objective."""

    def gradient(self, role):
        self.trainer.model.zero_grad()
        self.value(role).backward()
        found = [p.grad for p in self.parameters]
        self.trainer.model.zero_grad()
        return found

    @torch.no_grad()
    def loss(self, role):
        return self.value(role).item()

    def value(self, role):
        generator = torch.Generator().manual_seed(len(role))
        rows = torch.randn(8, 5, generator=generator)
        return (self.trainer.model(rows) - rows.sum(-1, keepdim=True)).square().mean()


def weights_after(name, parameters, mesh):
    """Three steps of plain descent with a combination."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    if mesh is not None:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    combination = COMBINATIONS[name](**parameters)
    window = Steps(combination, name, SimpleNamespace(model=model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(3):
        losses = {role: window.loss(role) for role in ("forget", "retain")}
        if combination.gradients:
            direction = combination.combine(window)
        else:
            by = combination.weights()
            pair = (window.gradient("forget"), window.gradient("retain"))
            direction = [by.forget * f + by.retain * r for f, r in zip(*pair, strict=True)]
        for parameter, gradient in zip(window.parameters, direction, strict=True):
            parameter.grad = gradient
        combination.before_step(number, window)
        optimizer.step()
        combination.after_step(Step(losses, 0.01, window))
    if mesh is not None:
        assert all(isinstance(p, DTensor) for p in window.parameters)
        return torch.cat([p.full_tensor().detach().flatten() for p in window.parameters])
    return torch.cat([p.detach().flatten() for p in window.parameters])


def main() -> None:
    """Do all runs."""
    mesh = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {name: weights_after(name, parameters, mesh) for name, parameters in RUNS.items()}
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, sys.argv[1])
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
