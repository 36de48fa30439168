"""A combination inside the Trainer's step: backward passes by role, losses after the step."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from unlearn_llm.combine import Combination, Step
from unlearn_llm.combine.vectors import Gradient
from unlearn_llm.errors import UserError
from unlearn_llm.progress import RoleLog
from unlearn_llm.types import Batch, Role

if TYPE_CHECKING:
    from unlearn_llm.trainer import UnlearnTrainer

FILE = "unlearn_combination.pt"


class Combining(TrainerCallback):
    """One optimiser step as its combination sees it (`combine.Window`), and the calls around it.

    Where a combination asks for gradients, nothing is done for a micro-batch until the last one of
    the step has come; then every gradient is a pass over all of them, accumulated in `p.grad` and
    averaged over the ranks with the last (trap 9), and set aside. So combining happens once per
    step, on what a plain step would have clipped.
    """

    def __init__(self, combination: Combination, name: str | None, trainer: "UnlearnTrainer"):
        """Connect.

        Args:
            name: What a checkpoint calls the combination; None: there is none, losses add up.
        """
        self.combination = combination
        self.name = name
        self.trainer = trainer
        self.batches: list[Batch] = []
        self._backward: Callable[..., Tensor] | None = None
        self._logged: set[Role] = set()
        self._losses: dict[Role, float] = {}
        self._seen: dict[str, list[float]] = defaultdict(list)

    def check_model(self) -> None:
        """Refuse what makes gradients random.

        Raises:
            UserError: dropout.
        """
        if self.combination.repeatable and self._has_dropout():
            raise UserError(
                f"combine: {self.name} takes differences of gradients, which dropout makes "
                "random. Set the model's dropout to 0 (lora: {dropout: 0.0})."
            )

    # The step, for the Trainer.

    def training_step(
        self, backward: Callable[..., Tensor], model: nn.Module, batch: Batch
    ) -> Tensor:
        """Do a micro-batch, or, where gradients are combined, the whole step at its last one.

        Args:
            backward: Computes the loss of a batch and runs the backward pass.
        """
        if not self.combination.gradients:
            return backward(model, batch)
        if self.trainer.accelerator.sync_gradients:
            self._backward, self._logged = backward, set()
            direction = self.combination.combine(self)
            for parameter, gradient in zip(self.parameters, direction, strict=True):
                parameter.grad = gradient
        # Losses are logged by role; what is returned here is not looked at.
        return torch.zeros((), device=self.trainer.accelerator.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the learning rate (ForgetLearningRate puts it back) and prepare the combination."""
        self._losses = dict(self.trainer.role_log.last)
        if self.combination.wants_loss_before(state.global_step) and self._has_dropout():
            self._losses["retain"] = self.loss("retain")
        for group in kwargs["optimizer"].param_groups:
            group["lr"] *= self.combination.learning_rate_scale()
        self._learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        self.combination.before_step(state.global_step, self)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the combination what the step has done."""
        self.combination.after_step(Step(self._losses, self._learning_rate, self))
        for name, value in self.combination.observations().items():
            self._seen[name].append(value)

    def drain(self) -> dict[str, float]:
        """Give means of what was observed since the last call, and start anew."""
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        return means

    # The window, for the combination.

    @property
    def parameters(self) -> list[Tensor]:
        """What trains."""
        assert self.trainer.model is not None
        return [p for p in self.trainer.model.parameters() if p.requires_grad]

    def gradient(self, role: Role) -> Gradient:
        """Gradient of a role's weighted loss over the step, at the weights as they are."""
        assert self._backward is not None
        accelerator, model = self.trainer.accelerator, self.trainer.model_wrapped
        for parameter in self.parameters:
            parameter.grad = None
        # Only the first pass of a role is at the weights whose loss the logs show.
        with self._apart() if role in self._logged else nullcontext():
            for i, batch in enumerate(self.batches):
                is_last = i == len(self.batches) - 1
                with nullcontext() if is_last else accelerator.no_sync(model):
                    self._backward(model, {role: batch[role]})
        self._logged.add(role)
        self.trainer.masking.mask_gradients()  # products are of the gradients that are used
        found = []
        for parameter in self.parameters:
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return found

    @torch.no_grad()
    def loss(self, role: Role) -> float:
        """A role's unweighted loss over the step, at the weights as they are, without dropout."""
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        with self._apart() as log:
            for batch in self.batches:
                inputs = self.trainer._prepare_inputs({role: batch[role]})
                self.trainer.compute_loss(model, inputs)  # type: ignore[arg-type]  # by role
        model.train(was_training)
        return log.losses(self.trainer.accelerator)[role]

    def reduce(self, partial_sums: Tensor) -> Tensor:
        """Add up partial sums where parameters are spread over the ranks."""
        first = self.parameters[0]
        if isinstance(first, DTensor):
            mesh = first.device_mesh
            if mesh.ndim != 1:
                raise UserError(
                    f"combine: {self.name} adds up over one group of ranks; this mesh has "
                    f"{mesh.ndim} dimensions. Use fully sharded FSDP2 or DDP."
                )
            dist.all_reduce(partial_sums, group=mesh.get_group())
        return partial_sums

    @contextmanager
    def _apart(self) -> Iterator[RoleLog]:
        """Keep the losses of a pass out of the logs."""
        kept, self.trainer.role_log = self.trainer.role_log, RoleLog()
        try:
            yield self.trainer.role_log
        finally:
            self.trainer.role_log = kept

    def _has_dropout(self) -> bool:
        model: Any = self.trainer.model
        return bool(model.config.to_dict().get("attention_dropout")) or any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
        )

    # Checkpoints.

    def write(self, folder: Path) -> None:
        """Write the combination's state beside a checkpoint, whole or not at all."""
        if self.name is None:
            return
        content = {"combine": self.name, "state": self.combination.state_dict()}
        unfinished = folder / f"{FILE}.tmp"
        torch.save(content, unfinished)
        os.replace(unfinished, folder / FILE)

    def read(self, folder: Path) -> None:
        """Go on from the state beside a checkpoint.

        Raises:
            UserError: the checkpoint was made with another combination, or with none.
        """
        file, saved = folder / FILE, None
        if file.is_file():
            saved = torch.load(file, map_location="cpu", weights_only=True)
        made_with = None if saved is None else saved["combine"]
        if made_with != self.name:
            raise UserError(
                f"{folder} was made with combine={made_with!r}, this run has {self.name!r}. "
                "Resume with the same settings, or start anew."
            )
        if saved is not None:
            self.combination.load_state_dict(saved["state"])
