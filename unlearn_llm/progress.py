"""What happened in the steps since the last log line, by role."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from unlearn_llm.types import ROLES, Role


class RoleLog:
    """Collects losses and gradient norms by role and gives their means."""

    def __init__(self) -> None:
        self.steps: dict[Role, int] = dict.fromkeys(ROLES, 0)
        """Steps of each role in the whole run, as far as this process has seen it."""
        self._shares: dict[Role, Tensor] = {}
        self._losses: dict[Role, list[float]] = defaultdict(list)
        self._norms: dict[Role, list[float]] = defaultdict(list)

    def add_loss(self, role: Role, share: Tensor) -> None:
        """Add a micro-batch's share of the step's loss (0-d, on the device)."""
        self._shares[role] = self._shares[role] + share if role in self._shares else share

    def end_step(self, grad_norm: float, accelerator: Accelerator) -> dict[Role, float]:
        """Close a step: add up the shares of all ranks and return each role's loss."""
        roles = list(self._shares)
        shares = torch.stack([self._shares[role].float() for role in roles])
        losses = dict(zip(roles, accelerator.reduce(shares, "sum").tolist(), strict=True))
        for role, loss in losses.items():
            self.steps[role] += 1
            self._losses[role].append(loss)
            if len(roles) == 1:  # the norm of a joint gradient belongs to neither role
                self._norms[role].append(grad_norm)
        self._shares = {}
        return losses

    def drain(self, learning_rates: Mapping[Role, float]) -> dict[str, float]:
        """Give means since the last call, `forget/loss` and so on, and start anew."""
        logs = {}
        for role, losses in self._losses.items():
            logs[f"{role}/loss"] = sum(losses) / len(losses)
            if norms := self._norms[role]:
                logs[f"{role}/grad_norm"] = sum(norms) / len(norms)
            logs[f"{role}/learning_rate"] = learning_rates[role]
        self._losses.clear()
        self._norms.clear()
        return logs
