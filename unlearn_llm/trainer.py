"""UnlearnTrainer: connects objective, schedule, optimiser and reference. Contains no formula."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

import unlearn_llm.losses  # noqa: F401  registers the names of the losses
from unlearn_llm.callbacks import ForgetLearningRate, forget_lr_scale
from unlearn_llm.combine import Combination
from unlearn_llm.combining import Combining
from unlearn_llm.config import NO_EVALUATION, UnlearnConfig, check_mask, check_run
from unlearn_llm.dataset import Collator, RoleDataset, read_refusals
from unlearn_llm.dual_setup import observations, set_up
from unlearn_llm.encode import CHAT, Encoder, check_context
from unlearn_llm.engines import check_engine
from unlearn_llm.errors import UserError
from unlearn_llm.hidden import check_layers
from unlearn_llm.masking import Masking
from unlearn_llm.masks import Mask
from unlearn_llm.models import check_finite, keep_float32_masters, select_trainable
from unlearn_llm.objective import Loss, Objective
from unlearn_llm.optim import set_role
from unlearn_llm.plan import Plan
from unlearn_llm.progress import RoleLog, check_step
from unlearn_llm.reference import Reference, frozen
from unlearn_llm.referring import Referring
from unlearn_llm.rows import QA, as_pairs, check_disjoint
from unlearn_llm.saving import SavingTrainer
from unlearn_llm.schedule import Schedule, ScheduledSampler
from unlearn_llm.scoring import score, unwrapped
from unlearn_llm.types import ROLES, Answer, Batch, Role, Scored, Sequences
from unlearn_llm.undisturbed import undisturbed
from unlearn_llm.zero import step_in_backward

Rows = Sequence[QA] | Sequence[Mapping[str, Any]]


class UnlearnTrainer(SavingTrainer):
    """A Trainer that forgets one data set and keeps another.

    Everything of the Trainer (callbacks, `report_to`, `output_dir/checkpoint-N`, resume, LoRA,
    `accelerate launch`) works as its users know it. Different are:

    - A step trains the roles that the schedule names. All micro-batches of a step, on all ranks,
      hold the same roles (trap 2).
    - Token means are exact over the step: 4 x 1, 2 x 2 and 1 x 4 (micro-batch x accumulation) and
      any number of ranks give the same weights (trap 8).
    - `num_train_epochs` counts passes over the forget set; it is turned into `max_steps`.
    - Logs are kept by role: `forget/loss`, `retain/grad_norm`...
    - A loss or gradient that is not finite stops the run before the weights change.
    - `combine` makes one update of the two gradients of a step (combining.py).
    - `mask` holds entries of the weights (masking.py).
    - Trainable weights are kept in float32: in bfloat16 an update of 1e-5 would vanish.
    """

    args: UnlearnConfig

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig,
        *,
        forget_dataset: Rows,
        retain_dataset: Rows,
        processing_class: PreTrainedTokenizerBase,
        encoder: Encoder | None = None,
        refusals: Sequence[str] | None = None,
        objective: Objective | None = None,
        schedule: Schedule | None = None,
        combine: Combination | None = None,
        mask: Mask | None = None,
        reference: Reference | None = None,
        evaluate_model: Callable[[nn.Module], dict[str, float]] | None = None,
        allow_overlap: bool = False,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        """Check and encode everything before anything expensive happens.

        Objects given here win over the names in `args`, as `optimizers=` does in the Trainer.

        Args:
            forget_dataset, retain_dataset: Questions and answers: QA pairs, or rows with columns
                question/answer, prompt/completion or messages.
            encoder: Prompt template and lengths; by default the tokenizer's chat template.
            combine: How the two gradients of a joint step become one (combine.COMBINATIONS).
            mask: Which entries of the weights may move (masks.MASKS).
            refusals: What "idk" answers are chosen from; by default the package's own.
            allow_overlap: Accept forget rows that also stand in the retain set.
            evaluate_model: Gives scores of the model; called by `evaluate` (eval_strategy).

        Raises:
            UserError: for data, names or combinations that cannot work.
        """
        args = copy.copy(args)  # max_steps is set below; the caller's config stays as it was
        self.objective: Objective = objective or args.build_objective()
        self.schedule: Schedule = schedule or args.build_schedule()
        combination = combine or args.build_combination()
        name = type(combine).__name__ if combine else args.combine
        self.combining = Combining(combination, name, self)
        chooser = mask or args.build_mask()
        self.masking = Masking(chooser, type(mask).__name__ if mask else args.mask, self)
        check_engine(
            args,
            self.objective,
            combination=combination,
            combine=name,
            mask=self.masking.name,
        )
        self.evaluate_model = evaluate_model
        encoder = encoder or Encoder(processing_class, CHAT)
        refusals = refusals if refusals is not None else read_refusals()
        forget_pairs = as_pairs(forget_dataset, "the forget set")
        retain_pairs = as_pairs(retain_dataset, "the retain set")
        check_disjoint(forget_pairs, retain_pairs, allow_overlap)
        self.masking.encode(forget_pairs, retain_pairs, encoder)
        self.role_rows = RoleDataset.encode(
            {"forget": forget_pairs, "retain": retain_pairs},
            encoder,
            {role: self._loss(role).answers for role in ROLES},
            refusals=refusals,
            seed=args.refusal_seed,
        )
        forget, retain = self.role_rows.rows["forget"], self.role_rows.rows["retain"]
        context = model.config.to_dict().get("max_position_embeddings")
        check_context(forget.lengths, context, "the forget set")
        check_context(retain.lengths, context, "the retain set")
        self._window_rows = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        if args.max_steps <= 0:
            passes = args.num_train_epochs * len(forget) / self._window_rows
            args.max_steps = self.schedule.steps_for(max(1, math.ceil(passes)))
        check_run(args, self.schedule, name, combination, evaluates=evaluate_model is not None)
        check_mask(self.schedule, args.max_steps, self.masking.name, chooser)
        for loss in (self.objective.forget, self.objective.retain):
            check_layers(unwrapped(model), loss.layers, loss.name)
        select_trainable(model, args.trainable)
        keep_float32_masters(model, autocast=args.bf16)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            # Checkpointed blocks drop gradients when their input needs none, as under LoRA
            # (trap 16; TRL does the same).
            model.enable_input_require_grads()
        pad_id = processing_class.pad_token_id
        # Padding is marked by position, so any token will do; the encoder asked for an end token.
        self.collator = Collator(int(processing_class.eos_token_id if pad_id is None else pad_id))
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=self.role_rows,
            # Only its presence counts: the Trainer demands one where eval_strategy is set.
            eval_dataset=None if evaluate_model is None else self.role_rows,
            processing_class=processing_class,
            # Held entries are back before a combination looks at the new weights.
            callbacks=[*(callbacks or []), ForgetLearningRate(), self.masking, self.combining],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=args.build_optimizer(),
        )
        self.combining.check_model()
        # Tells the Trainer that losses are not divided by num_items_in_batch (trap 8).
        self.model_accepts_loss_kwargs = False
        self.reference = reference
        self.referring = Referring(self)
        self.add_callback(self.referring)
        self.role_log = RoleLog()
        self._set_up: Optimizer | None = None
        self._denominators: dict[Role, Tensor | None] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimiser and tell a dual one about the model."""
        optimizer: Optimizer = super().create_optimizer(model)
        if optimizer is self._set_up:  # under DeepSpeed the Trainer asks twice
            return optimizer
        self._set_up = optimizer
        if self.is_deepspeed_enabled:
            step_in_backward(optimizer, self)
        set_up(
            optimizer,
            model or self.model,  # type: ignore[arg-type]  # there is one by now
            quantize_embeddings=self.args.quantize_embeddings,
        )
        return optimizer

    # Data: the plan of the whole run.

    def get_train_dataloader(self) -> DataLoader:
        """Serve the plan of all steps; the loader's one epoch is the whole run (trap 3)."""
        sampler = ScheduledSampler(
            self.schedule,
            lengths={role: rows.lengths for role, rows in self.role_rows.rows.items()},
            steps=self.args.max_steps,
            window=self._window_rows,
            seed=self.args.seed,
            pairing=self.args.pairing,
            by_length=self.args.averaging == "window",
        )
        loader: DataLoader = DataLoader(
            self.role_rows,
            batch_size=self.args.per_device_train_batch_size,
            sampler=sampler,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.accelerator.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """Take the micro-batches of one step; check their roles; count what losses divide by."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        roles = self.schedule.roles(self.state.global_step)
        for batch in batches:
            if tuple(batch) != roles:
                raise RuntimeError(
                    f"Step {self.state.global_step} drew roles {tuple(batch)} but the schedule "
                    f"says {roles}. The data order does not match this run; resume with the same "
                    "seed, per-device batch size, accumulation and world size, or start anew."
                )
        assert self.optimizer is not None  # the Trainer made it before the first batch
        if len(roles) == 1:
            set_role(self.optimizer, roles[0])
        if self.args.averaging == "window":
            counts = torch.tensor(
                [sum(self._count(role, batch[role]) for batch in batches) for role in roles],
                device=self.accelerator.device,
            )
            totals = self.accelerator.reduce(counts, "sum")
            self._denominators = dict(zip(roles, totals, strict=True))
        self.combining.batches = batches
        return batches, None

    # One step.

    def training_step(  # type: ignore[override]  # batches are keyed by role
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Do a micro-batch; gradients that are combined are made with the last of the step."""
        loss = self.combining.training_step(super().training_step, model, inputs)
        if self.accelerator.sync_gradients:
            self.masking.mask_gradients()
        return loss

    def compute_loss(  # type: ignore[override]  # batches are keyed by role
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Compute the weighted losses of the roles in this micro-batch.

        Each is this micro-batch's share of the mean over the window, so that the shares of all
        micro-batches and ranks add up to the mean.
        """
        ranks, accumulation = self.args.world_size, self.current_gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        with self.accelerator.autocast():
            for role, sequences in inputs.items():
                loss = self._loss(role)
                policy = score(model, sequences, loss.positions, loss.layers)
                reference = None
                if loss.reference is not None:
                    assert self.reference is not None  # made in train()
                    reference = self.reference(role, sequences, loss.positions, loss.layers)
                values = loss(policy, reference)
                if self.args.averaging == "window":
                    denominator: Any = self._denominators[role]
                else:
                    counted = loss.count(sequences, partial(dict, policy))
                    denominator = counted * accumulation * ranks
                share = values.sum() / denominator
                self.role_log.add_loss(role, share.detach())
                total = total + self._weight(role) * share
        # The Trainer divides by the accumulation steps and DDP averages over ranks; the shares
        # are complete already.
        return total * ranks * accumulation

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Stop before the optimiser steps if the loss or the gradient is not finite."""
        norm = float(super()._get_grad_norm(model, grad_norm))
        self.end_step(norm)
        return norm

    def end_step(self, norm: float) -> None:
        """Note a step, which may be noted already; stop if a loss or its gradient is not finite."""
        if self.role_log.is_open:
            losses = self.role_log.end_step(norm, self.accelerator)
            step, folder = self.state.global_step, self.args.output_dir
            check_step(losses, norm, step, folder, self.args.max_retain_loss)

    def train(  # type: ignore[override]  # the rest is passed on as it is
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> TrainOutput:
        """Train; see Trainer.train. A checkpoint of another plan is refused."""
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None:
            self._plan().check(checkpoint)
            self.combining.read(checkpoint)
        # Before a checkpoint is loaded: the reference is the model at the start (trap 12).
        self.referring.prepare(checkpoint)
        self.masking.prepare(checkpoint)
        return super().train(str(checkpoint) if checkpoint else None, **keywords)

    def evaluate(self, *args: Any, **keywords: Any) -> dict[str, float]:
        """Give the scores of the model, as `evaluate_model` computes them, undisturbing."""
        if self.evaluate_model is None:
            raise UserError(NO_EVALUATION)
        prefix = keywords.get("metric_key_prefix", "eval")
        assert self.model is not None
        with undisturbed(self.model):
            scores = self.evaluate_model(self.model)
        metrics = {f"{prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log by role; one loss averaged over forget and retain steps would say nothing."""
        logs.pop("train_loss", None)
        if logs.pop("loss", None) is not None:
            logs.pop("grad_norm", None)
            base = logs.pop("learning_rate")
            rates: dict[Role, float] = {"forget": base * forget_lr_scale(self.args), "retain": base}
            logs.update(self.role_log.drain(rates))
            logs.update(observations(self.optimizer))
            logs.update(self.combining.drain())
            for role, rows in self.role_rows.rows.items():
                steps = sum(role in self.schedule.roles(i) for i in range(self.state.global_step))
                logs[f"{role}/epoch"] = steps * self._window_rows / len(rows)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(model, self.state.global_step)
        super()._save_checkpoint(model, trial)

    def write_beside(self, checkpoint: Path) -> None:
        """Write what else a checkpoint needs."""
        self._plan().write(checkpoint)
        self.combining.write(checkpoint)
        self.masking.write(checkpoint)
        self.referring.write(checkpoint)

    # What the steps are made of.

    def _loss(self, role: Role) -> Loss:
        return self.objective.forget if role == "forget" else self.objective.retain

    def _count(self, role: Role, sequences: dict[Answer, Sequences]) -> int | float:
        def policy() -> dict[Answer, Scored]:
            inputs: Any = self._prepare_inputs(sequences)  # type: ignore[arg-type]  # by answer
            with frozen(self.model_wrapped), self.accelerator.autocast():
                return score(self.model_wrapped, inputs, self._loss(role).positions)

        return self._loss(role).count(sequences, policy)

    def _weight(self, role: Role) -> float:
        by = self.combining.combination.weights()
        if role == "forget":
            faded = self.args.forget_fade(self.state.global_step)
            return self.objective.forget_weight * faded * by.forget
        return self.objective.retain_weight * by.retain

    def _plan(self) -> Plan:
        return Plan(
            objective=self.objective.name,
            schedule=repr(self.schedule),
            seed=self.args.seed,
            refusal_seed=self.args.refusal_seed,
            window=self._window_rows,
            micro_batch=self.args.per_device_train_batch_size,
            forget_rows=len(self.role_rows.rows["forget"]),
            retain_rows=len(self.role_rows.rows["retain"]),
            pairing=self.args.pairing,
        )
