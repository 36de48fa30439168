"""One unlearning run with a look at itself: its own losses before and after, time, passes, memory.

`measured_run` gives:

objective   [before, after] of "forget" and "retain" loss on a fixed batch, the first rows of each
            set; with a retain loss as the thing shown, "retain_without" is that of the same run
            without retain steps: a retain loss is at its best before forgetting begins.
moved       Did the loss that the run is to show move the right way?
seconds     Process time of a step.
passes      Forward and backward passes of a step, and forward passes without gradient.
vectors     Of the size of the model, beside weights and gradient: of optimiser, combination and
            reference.
non_finite  Why the run stopped, or null.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback
from watching import Passes, live_vectors, state_vectors

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import NonFiniteError
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.models import load_model, load_tokenizer
from unlearn_llm.objective import FORGET_LOSSES, Loss
from unlearn_llm.pipeline import EVALUATION
from unlearn_llm.recipe import Recipe
from unlearn_llm.recipe_rows import forget_and_retain
from unlearn_llm.scoring import score
from unlearn_llm.trainer import UnlearnTrainer
from unlearn_llm.types import ROLES, Role

ROWS = 40
WATCHED_STEP = 1
"""The second: the optimiser's moments are there, and a memory of gradients."""
UNWEIGHTED = {"wga": "ga", "satimp": "ga", "adaga": "ga", "wtnpo": "tnpo"}
"""Losses with detached weights that shrink as p falls: what their gradient lowers is the rest."""


def measured_run(recipe: Recipe) -> dict[str, Any]:
    """Train as a recipe says, measure, and evaluate into the run's folder."""
    torch.set_num_threads(1)
    watch = Watch()
    trainer, encoder = build(recipe, watch)
    shows_retain = recipe.about.get("group") == "retain loss"
    try:
        trainer.train()
    except NonFiniteError as error:
        return {"non_finite": str(error)}
    forget, retain = watch.losses["forget"], watch.losses["retain"]
    objective: dict[str, Any] = {"forget": forget, "retain": retain}
    moved = forget[1] < forget[0]
    if shows_retain:
        objective["retain_without"] = without_retain(recipe)
        moved = moved and retain[1] < objective["retain_without"]
    suite = recipe.suite()
    assert suite is not None and recipe.evaluate is not None
    evaluate(
        suite,
        trainer.model.eval(),
        encoder,
        recipe.output_dir / EVALUATION,
        reference_records=recipe.evaluate.reference,
    )
    steps = trainer.state.global_step
    return {
        "objective": objective,
        "moved": moved,
        "seconds": watch.seconds / (steps - 1),
        "passes": {kind: count / steps for kind, count in watch.passes.counts.items()},
        "vectors": watch.vectors,
        "log": trainer.state.log_history,
        "non_finite": None,
    }


def build(recipe: Recipe, watch: "Watch") -> tuple[UnlearnTrainer, Encoder]:
    """Make the trainer of a recipe, watched."""
    forget, retain = forget_and_retain(recipe.data)
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.data.template, recipe.data.max_length)
    arguments: Any = recipe.arguments()
    trainer = UnlearnTrainer(
        load_model(recipe.model),
        arguments,
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        encoder=encoder,
        callbacks=[watch],
    )
    watch.trainer = trainer
    return trainer, encoder


def without_retain(recipe: Recipe) -> float:
    """The retain loss after the forget steps of a run alone."""
    alone = {"schedule": "alternate", "schedule_parameters": {"forget": 1, "retain": 0}}
    watch = Watch()
    trainer, _ = build(replace(recipe, train={**recipe.train, **alone}), watch)
    trainer.train()
    return watch.losses["retain"][1]


class Watch(TrainerCallback):
    """Looks at a run from the outside."""

    trainer: UnlearnTrainer

    def __init__(self) -> None:
        self.losses: dict[Role, list[float]] = {role: [] for role in ROLES}
        self.seconds = self.vectors = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the losses; begin to count."""
        self._take_losses()
        self.passes = Passes(self.trainer).__enter__()
        self._started = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """In the watched step, look at memory whenever gradients are made."""
        if state.global_step == WATCHED_STEP:
            for method in ("gradient", "loss"):
                setattr(self.trainer.combining, method, self._looking(method))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at memory where the gradient of the step is alive."""
        if state.global_step == WATCHED_STEP:
            self._look()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the time of the step, but of the watched one."""
        if state.global_step != WATCHED_STEP + 1:
            self.seconds += time.process_time() - self._started
        else:
            for method in ("gradient", "loss"):
                delattr(self.trainer.combining, method)
        self._started = time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the losses again."""
        self.passes.__exit__()
        self._take_losses()

    def _looking(self, method: str) -> Any:
        inner = getattr(self.trainer.combining, method)

        def looked(role: Role) -> Any:
            result = inner(role)
            self._look()
            return result

        return looked

    def _look(self) -> None:
        beside_gradient = live_vectors(self.trainer) - 1
        self.vectors = max(self.vectors, beside_gradient + state_vectors(self.trainer))

    def _take_losses(self) -> None:
        for role in ROLES:
            self.losses[role].append(fixed_loss(self.trainer, role))


@torch.no_grad()
def fixed_loss(trainer: UnlearnTrainer, role: Role) -> float:
    """A role's loss on the first rows of its data."""
    loss: Loss = getattr(trainer.objective, role)
    rows = trainer.role_rows.rows[role]
    batch = trainer.collator([{role: rows[row]} for row in range(min(ROWS, len(rows)))])[role]
    policy = score(trainer.model, batch, loss.positions, loss.layers)
    reference = None
    if loss.reference is not None:
        assert trainer.reference is not None
        reference = trainer.reference(role, batch, loss.positions, loss.layers)
    if loss.name in UNWEIGHTED:
        loss = FORGET_LOSSES[UNWEIGHTED[loss.name]]
    return float(loss(policy, reference).sum()) / loss.count(batch)
