"""Every training knob: TrainingArguments and what unlearning adds to them."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from torch.optim import Optimizer
from transformers import TrainingArguments

from unlearn_llm.combine import Combination
from unlearn_llm.combine.base import build
from unlearn_llm.errors import UserError
from unlearn_llm.masks import Mask
from unlearn_llm.masks.base import build as build_mask
from unlearn_llm.objective import Objective
from unlearn_llm.optim import OPTIMIZERS, DualAdamW
from unlearn_llm.schedule import SCHEDULES, Pairing, Schedule
from unlearn_llm.types import ROLES

NO_EVALUATION = (
    "Nothing to evaluate with: give UnlearnTrainer(evaluate_model=...), or set eval_strategy: no."
)


@dataclass
class UnlearnConfig(TrainingArguments):
    """TrainingArguments for UnlearnTrainer. The string under a field is its help text."""

    objective: str = "idk+ap"
    """What is minimised: forget loss, plus sign, retain loss (`unlearn list` names them)."""
    forget_parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the forget loss, such as {beta: 0.1}."""
    retain_parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the retain loss."""
    forget_weight: float = 1.0
    """Coefficient of the forget loss."""
    forget_weight_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the coefficient of the forget loss falls to 0 over the run, along half a cosine."""
    retain_weight: float = 1.0
    """Coefficient of the retain loss."""
    schedule: str = "alternate"
    """When each side is trained: joint or alternate."""
    schedule_parameters: dict[str, Any] = field(default_factory=dict)
    """For alternate: {forget: 1, retain: 5}, the number of steps of each side in a cycle."""
    combine: str | None = None
    """Joint steps: how the two gradients become one, such as surgery or ngdiff (`unlearn list`
    names them), or package.module:Class; null: they add up."""
    combine_parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the combination, such as {eps: 0.0}."""
    mask: str | None = None
    """Which entries of the weights may move: salun, sfron or package.module:Class; null: all."""
    mask_parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the mask, such as {share: 0.5}."""
    pairing: Pairing = "random"
    """Joint steps: does a forget row meet a new retain row in every pass (random), or always the
    same one (fixed, as in the authors' joint baseline)?"""
    refusal_seed: int = 0
    """Which refusal or random answer a row learns: fixed by (refusal_seed, row), whatever `seed`
    is."""
    optimizer: str | None = None
    """dual_adamw, dual_adamw_plus or package.module:Class; null: the Trainer's own `optim`."""
    optimizer_parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the optimiser, such as {betas: [0.9, 0.95], state_bits: 8}."""
    quantize_embeddings: bool = False
    """With state_bits: 8, keep the moments of embeddings in 8 bits too."""
    forget_learning_rate: float | None = None
    """Learning rate of forget steps; null: learning_rate."""
    averaging: Literal["window", "micro_batch"] = "window"
    """Token means over the whole optimiser step on all ranks (window), or the mean of micro-batch
    means, which depends on how the batch is split (micro_batch, as in the authors' runs)."""
    reference: Literal["auto", "precomputed", "adapter", "frozen"] = "auto"
    """Frozen model of npo, dpo, kl: auto, precomputed, adapter or frozen. auto computes
    log-probabilities once where they suffice, else disables a fresh adapter, else copies (of an
    adapter that is trained further only what trains)."""
    trainable: str | None = None
    """Regular expression over parameter names: only these train. null: whatever requires grad."""
    max_retain_loss: float | None = None
    """Stop, as at a loss that is not finite, at a step whose retain loss is larger: what should be
    kept is being lost. An untrained model has log(vocabulary). null: never."""

    # Changed defaults of TrainingArguments:
    adam_beta2: float = 0.95
    """As the DualOptim+ runs; transformers' default is 0.999."""
    weight_decay: float = 0.01
    ddp_find_unused_parameters: bool | None = False
    """Every step uses every weight that trains. Searching for unused ones costs time, and would
    miss the output head, which is applied outside the model's forward pass (scoring.py)."""
    remove_unused_columns: bool = False
    """Must stay off: a batch is keyed by role."""
    logging_nan_inf_filter: bool = False
    """Must stay off: it hides a diverging forget loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob in fields(self):
            value, allowed = getattr(self, knob.name), get_args(knob.type)
            if get_origin(knob.type) is Literal and value not in allowed:
                raise UserError(f"{knob.name}: expected {' or '.join(allowed)}, got {value!r}.")
        if self.fp16:
            raise UserError(
                "fp16: its loss scaling overflows by design, and a gradient that is not finite "
                "stops the run. Use bf16: true, or neither."
            )
        if self.remove_unused_columns or self.logging_nan_inf_filter:
            raise UserError(
                "remove_unused_columns and logging_nan_inf_filter must be false: batches are keyed "
                "by role, and a diverging loss must be seen."
            )

    def build_combination(self) -> Combination:
        """Make the combination that these settings name; without one, losses add up."""
        if self.combine is not None:
            return build(self.combine, self.combine_parameters)
        if self.combine_parameters:
            raise UserError("combine_parameters are given, but combine names no combination.")
        return Combination()

    def forget_fade(self, step: int) -> float:
        """Give what forget_weight is multiplied by at a step: forget_weight_schedule."""
        if self.forget_weight_schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * step / self.max_steps)) / 2

    def build_mask(self) -> Mask | None:
        """Make the mask that these settings name."""
        if self.mask is not None:
            return build_mask(self.mask, self.mask_parameters)
        if self.mask_parameters:
            raise UserError("mask_parameters are given, but mask names no mask.")
        return None

    def build_objective(self) -> Objective:
        """Make the objective that these settings name."""
        return Objective.parse(
            self.objective,
            forget=self.forget_parameters,
            retain=self.retain_parameters,
            forget_weight=self.forget_weight,
            retain_weight=self.retain_weight,
        )

    def build_optimizer(self) -> tuple[type[Optimizer], dict[str, Any]] | None:
        """Give the optimiser's class and keyword arguments; None: the Trainer's own."""
        if self.optimizer is None:
            return None
        cls = OPTIMIZERS[self.optimizer]
        settings: dict[str, Any] = {"lr": self.learning_rate}
        if issubclass(cls, DualAdamW):  # of other classes the arguments are not known
            settings |= {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        return cls, {**settings, **self.optimizer_parameters}

    def build_schedule(self) -> Schedule:
        """Make the schedule that these settings name."""
        schedule = SCHEDULES[self.schedule]
        try:
            return schedule(**self.schedule_parameters)
        except TypeError as error:
            raise UserError(f"schedule_parameters of {self.schedule!r}: {error}.") from error


def check_one_role(
    schedule: Schedule,
    steps: int,
    *,
    optimizer: str | None = None,
    forget_learning_rate: float | None = None,
) -> None:
    """Refuse what needs steps of one role under a schedule that trains both in one step.

    Raises:
        UserError: a dual optimiser, or a learning rate for forget steps.
    """
    if all(len(schedule.roles(step)) == 1 for step in range(steps)):
        return
    if optimizer is not None and issubclass(OPTIMIZERS[optimizer], DualAdamW):
        raise UserError(
            f"{optimizer} keeps one state per role, so each step must train one role; this "
            "schedule trains both. Use schedule: alternate, or optimizer: null."
        )
    if forget_learning_rate is not None:
        raise UserError(
            "forget_learning_rate needs steps that train one role; this schedule trains both. "
            "Use forget_weight instead."
        )


def check_both_roles(
    schedule: Schedule,
    steps: int,
    combine: str | None,
    combination: Combination,
    *,
    optimizer: str | None = None,
    retain_weight: float = 1.0,
) -> None:
    """Refuse a combination where a step trains one role, or something else sets its weights.

    Raises:
        UserError: saying what to do instead.
    """
    if combine is None:
        return
    if optimizer is not None and issubclass(OPTIMIZERS[optimizer], DualAdamW):
        raise UserError(
            f"{optimizer} keeps one state per role, so each step must train one role; combine: "
            f"{combine} needs both in one step. Use optimizer: null (and schedule: joint) to "
            "combine gradients, or combine: null (and schedule: alternate) to keep two states."
        )
    if any(len(schedule.roles(step)) == 1 for step in range(steps)):
        raise UserError(
            f"combine: {combine} needs steps that train both roles; this schedule has steps of "
            "one. Use schedule: joint, or combine: null."
        )
    if combination.sets_retain_weight and retain_weight != 1:
        raise UserError(
            f"combine: {combine} sets the weight of the retain loss itself; retain_weight must "
            f"be 1, got {retain_weight:g}. Use forget_weight."
        )


def check_mask(schedule: Schedule, steps: int, name: str | None, mask: Mask | None) -> None:
    """Refuse a mask of one role where a step trains both: their gradients are one.

    Raises:
        UserError: saying what to do instead.
    """
    if mask is None or set(mask.roles) == set(ROLES):
        return
    if any(len(schedule.roles(step)) > 1 for step in range(steps)):
        raise UserError(
            f"mask: {name} holds entries in {mask.roles[0]} steps only, so each step must train "
            "one role; this schedule trains both. Use schedule: alternate."
        )


def check_run(
    args: UnlearnConfig,
    schedule: Schedule,
    combine: str | None,
    combination: Combination,
    *,
    evaluates: bool,
) -> None:
    """Refuse what cannot work together, before the model is touched.

    Args:
        combine: What the combination is called in messages; None: there is none.
        evaluates: Is there something that scores the model?

    Raises:
        UserError: saying what to do instead.
    """
    if args.eval_strategy != "no" and not evaluates:
        raise UserError(NO_EVALUATION)
    check_both_roles(
        schedule,
        args.max_steps,
        combine,
        combination,
        optimizer=args.optimizer,
        retain_weight=args.retain_weight,
    )
    check_one_role(
        schedule,
        args.max_steps,
        optimizer=args.optimizer,
        forget_learning_rate=args.forget_learning_rate,
    )
    if args.n_gpu > 1:
        raise UserError(
            f"One process sees {args.n_gpu} GPUs. Start one process per GPU: "
            "accelerate launch -m unlearn_llm train ..."
        )
    config: Any = args.accelerator_config
    if config.split_batches or config.dispatch_batches:
        raise UserError(
            "accelerator_config: split_batches and dispatch_batches must be off; the plan "
            "deals whole micro-batches to the ranks."
        )
