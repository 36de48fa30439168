"""What happened in the steps since the last log line, by role, and whether it was finite."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from unlearn_llm.errors import NonFiniteError
from unlearn_llm.types import Role


class RoleLog:
    """Collects losses and gradient norms by role and gives their means.

    Attributes:
        last: Each role's loss in the last step that was closed.
    """

    def __init__(self) -> None:
        self.last: dict[Role, float] = {}
        self._shares: dict[Role, Tensor] = {}
        self._losses: dict[Role, list[float]] = defaultdict(list)
        self._norms: dict[str, list[float]] = defaultdict(list)

    @property
    def is_open(self) -> bool:
        """Is there a step whose losses were added, but which is not closed?"""
        return bool(self._shares)

    def add_loss(self, role: Role, share: Tensor) -> None:
        """Add a micro-batch's share of the step's loss (0-d, on the device)."""
        self._shares[role] = self._shares[role] + share if role in self._shares else share

    def end_step(self, grad_norm: float, accelerator: Accelerator) -> dict[Role, float]:
        """Close a step and return each role's loss."""
        roles = list(self._shares)
        losses = self.last = self.losses(accelerator)
        for role, loss in losses.items():
            self._losses[role].append(loss)
        # The norm of a joint step's gradient belongs to neither role.
        self._norms[f"{roles[0]}/" if len(roles) == 1 else ""].append(grad_norm)
        self._shares = {}
        return losses

    def losses(self, accelerator: Accelerator) -> dict[Role, float]:
        """Add up the shares of all ranks: each role's loss in the step that is under way."""
        shares = torch.stack([share.float() for share in self._shares.values()])
        return dict(zip(self._shares, accelerator.reduce(shares, "sum").tolist(), strict=True))

    def drain(self, learning_rates: Mapping[Role, float]) -> dict[str, float]:
        """Give means since the last call, `forget/loss` and so on, and start anew."""
        logs = {}
        for role, losses in self._losses.items():
            logs[f"{role}/loss"] = sum(losses) / len(losses)
            logs[f"{role}/learning_rate"] = learning_rates[role]
        for prefix, norms in self._norms.items():
            logs[f"{prefix}grad_norm"] = sum(norms) / len(norms)
        self._losses.clear()
        self._norms.clear()
        return logs


def check_step(
    losses: Mapping[Role, float],
    grad_norm: float,
    step: int,
    output_dir: str | None,
    max_retain_loss: float | None = None,
) -> None:
    """Refuse a step whose losses or gradient are not finite, or whose retain loss is too large.

    Raises:
        NonFiniteError: naming the loss, and the last checkpoint in the folder.
    """
    for role, loss in losses.items():
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_too_large = role == "retain" and max_retain_loss is not None and loss > max_retain_loss
        if is_finite and not is_too_large:
            continue
        allowed = f" (max_retain_loss: {max_retain_loss:g})" if is_too_large else ""
        kept = get_last_checkpoint(output_dir)
        raise NonFiniteError(
            f"Step {step}: the {role} loss is {loss:g}{allowed} and the gradient "
            f"norm {grad_norm:g}. Stopped before the weights changed. "
            f"{'Last good checkpoint: ' + kept if kept else 'No checkpoint was saved yet'}"
            ". Try a smaller learning rate or forget_weight, or a bounded forget loss "
            "(idk, me, npo)."
        )
