"""Callbacks that every unlearning run has."""

from typing import Any

from transformers import TrainerCallback

from unlearn_llm.config import UnlearnConfig


class ForgetLearningRate(TrainerCallback):
    """Scales the learning rate of forget steps, whatever the optimiser."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the rate of groups whose role is forget."""
        self._scheduled = [group["lr"] for group in kwargs["optimizer"].param_groups]
        for group in kwargs["optimizer"].param_groups:
            if group.get("role") == "forget":
                group["lr"] = group["lr"] * forget_lr_scale(args)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the scheduled rate back: some schedulers read it."""
        for group, lr in zip(kwargs["optimizer"].param_groups, self._scheduled, strict=True):
            group["lr"] = lr


def forget_lr_scale(args: UnlearnConfig) -> float:
    """Give the learning rate of forget steps relative to the others."""
    if args.forget_learning_rate is None:
        return 1.0
    return args.forget_learning_rate / args.learning_rate
