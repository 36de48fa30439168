"""DeepSpeed's optimiser step, which it takes inside the backward pass: what must go around it."""

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from unlearn_llm.callbacks import ForgetLearningRate

if TYPE_CHECKING:
    from unlearn_llm.trainer import UnlearnTrainer


def step_in_backward(optimizer: Optimizer, trainer: "UnlearnTrainer") -> None:
    """Do around the steps of ZeRO's inner optimiser what the Trainer does too late.

    Under DeepSpeed the Trainer asks for the norm and calls its callbacks when the weights have
    changed. So the losses and the norm are looked at, and the learning rate of forget steps is set,
    in hooks of the optimiser itself, which ZeRO steps once per group or sub-group with the clipped
    gradient. A gradient that is not finite may also make ZeRO leave the step out; then
    `_get_grad_norm` sees it.

    Source: DeepSpeed 0.19 runtime/zero/stage_1_and_2.py, stage3.py (step, _optimizer_step).
    """
    rate = ForgetLearningRate()

    def before(stepped: Optimizer, *arguments: Any) -> None:
        engine: Any = trainer.model_wrapped
        trainer.end_step(float(engine.optimizer._global_grad_norm))  # before clipping
        rate.on_pre_optimizer_step(trainer.args, None, None, optimizer=stepped)

    def after(stepped: Optimizer, *arguments: Any) -> None:
        rate.on_optimizer_step(trainer.args, None, None, optimizer=stepped)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
