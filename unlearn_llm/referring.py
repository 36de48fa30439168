"""When the reference of a run is made: before its first step, at the weights from before it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from unlearn_llm.engines import engine_of
from unlearn_llm.reference import Precomputed, choose_reference

if TYPE_CHECKING:
    from unlearn_llm.trainer import UnlearnTrainer

FILE = "unlearn_reference.pt"


class Referring(TrainerCallback):
    """Makes the reference, or reads it beside a checkpoint.

    Where every process has the whole model it is made before a checkpoint is loaded. Where weights
    are spread, only the wrapped model can be asked, which has a checkpoint's weights already: then
    it is computed at the first step, and checkpoints keep it.
    """

    def __init__(self, trainer: "UnlearnTrainer") -> None:
        self.trainer = trainer
        self.sharded = engine_of(trainer.args).sharded

    def prepare(self, checkpoint: Path | None) -> None:
        """Make the reference at the weights as they are, or read it."""
        trainer = self.trainer
        if trainer.reference is not None or not trainer.objective.needs:
            return
        if not self.sharded:
            trainer.reference = choose_reference(
                trainer.args.reference,
                trainer.objective.needs,
                trainer.model,
                trainer.role_rows.rows,
                trainer.collator,
                self._batch_size,
                trainer.accelerator,
            )
        elif checkpoint is not None:
            saved = torch.load(checkpoint / FILE, map_location="cpu", weights_only=True)
            trainer.reference = Precomputed.from_state(saved)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the wrapped model, where weights are spread."""
        trainer = self.trainer
        if trainer.reference is None and trainer.objective.needs:
            trainer.reference = Precomputed.compute(
                trainer.model_wrapped,
                {role: trainer.role_rows.rows[role] for role in trainer.objective.needs},
                trainer.collator,
                self._batch_size,
                trainer.accelerator,
            )

    def write(self, folder: Path) -> None:
        """Write it beside a checkpoint, whole or not at all; without shards nothing."""
        if self.sharded and isinstance(self.trainer.reference, Precomputed):
            unfinished = folder / f"{FILE}.tmp"
            torch.save(self.trainer.reference.state(), unfinished)
            os.replace(unfinished, folder / FILE)

    @property
    def _batch_size(self) -> int:
        return 4 * self.trainer.args.per_device_train_batch_size  # no gradients: more fits
