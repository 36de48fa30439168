"""A Trainer whose checkpoints are whole or not there, and that leaves when it is told to."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from unlearn_llm.checkpoints import STAGING, clean, commit, fault, newest, rotate
from unlearn_llm.errors import DISK_FULL, UserError, WriteError
from unlearn_llm.preemption import LeaveTogether

ARGUMENTS = "training_args.json"
NO_PUSH = (
    "the folder of a run holds private/ and checkpoints, of which the first still know the forget "
    "set. Upload the finished model by itself: hf upload REPOSITORY FOLDER, with its files only."
)


class SavingTrainer(Trainer):
    """What every Trainer here does about checkpoints.

    - They are written in `.unfinished/` and renamed when every rank has written its part.
    - An older one is removed (`save_total_limit`) only after that.
    - Arguments are kept as JSON. The Trainer pickles them, with the token for the hub in them.
    - Nothing is pushed to the hub: the Trainer would upload all that is in the folder.
    - SIGTERM and SIGUSR1 save and stop all ranks after the same step (preemption.py).
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Make a Trainer; see Trainer."""
        self._staging: Path | None = None
        given = keywords.get("args", args[1] if len(args) > 1 else None)
        if given is not None and given.push_to_hub:
            raise UserError(f"push_to_hub: {NO_PUSH}")
        super().__init__(*args, **keywords)
        self.leaving = LeaveTogether(self)
        self.add_callback(self.leaving)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """Give the checkpoint that `train` was asked to go on from; True: the newest good one.

        Raises:
            UserError: there is none, or the one that was named is damaged.
        """
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            found = newest(Path(str(self.args.output_dir)))
            if found is None:
                raise UserError(f"{self.args.output_dir} holds no checkpoint to resume from.")
            return found
        checkpoint = Path(resume_from_checkpoint)
        reason = fault(checkpoint) if checkpoint.is_dir() else "there is no such folder"
        if reason is not None:
            raise UserError(f"{checkpoint} cannot be resumed from: {reason}.")
        return checkpoint

    def train(  # type: ignore[override]  # the rest is passed on as it is
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> TrainOutput:
        """Train; see Trainer.train.

        Raises:
            Preempted: after a signal, when a checkpoint is saved.
            WriteError: a checkpoint could not be written; those before are untouched.
        """
        if self.args.should_save:
            clean(Path(str(self.args.output_dir)))
        self.accelerator.wait_for_everyone()
        with self.leaving.training():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Gather weights that are spread, on the first rank; every rank calls it.

        Returns:
            By name, on the CPU. On other ranks perhaps nothing.
        """
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        return self.accelerator.get_state_dict(model) or {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as `from_pretrained` loads it; see Trainer.save_model.

        With the sharded checkpoints of FSDP the Trainer leaves the model itself out.
        """
        if self.is_fsdp_enabled and "SHARDED" in str(
            self.accelerator.state.fsdp_plugin.state_dict_type
        ):
            self._save(output_dir, self.whole_weights())
        super().save_model(output_dir, _internal_call)

    def write_beside(self, checkpoint: Path) -> None:
        """Write what else a checkpoint needs; called where `args.should_save`."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / STAGING
        try:
            self._together(folder / name, lambda: self._write(model, trial, name))
        finally:
            self._staging = None
        if self.args.should_save:
            self._together(folder / name, lambda: commit(folder / STAGING / name, folder / name))
        else:
            self._together(folder / name, lambda: None)
        if self.args.should_save:
            rotate(folder / name, self.args.save_total_limit, self.state.best_model_checkpoint)
            clean(folder)

    def _write(self, model: nn.Module, trial: Any, name: str) -> None:
        """Write this rank's part of a checkpoint."""
        assert self._staging is not None
        best = self.state.best_model_checkpoint
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        staged = self._staging / name
        self.write_beside(staged)
        if self.state.best_global_step:
            # The Trainer looked for the best one where this one is written.
            known = self._staging.parent / f"checkpoint-{self.state.best_global_step}"
            is_there = known.is_dir() or known.name == name
            self.state.best_model_checkpoint = str(known) if is_there else best
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def push_to_hub(self, *args: Any, **keywords: Any) -> Any:
        """Refuse to upload the folder of a run."""
        raise UserError(f"push_to_hub: {NO_PUSH}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Not even for the moment until the pickle of the arguments is removed.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / ARGUMENTS).write_text(self.args.to_json_string(), encoding="utf-8")

    def _together(self, checkpoint: Path, action: Callable[[], None]) -> None:
        """Do something on every rank; if it fails on one, stop all of them."""
        failed: Exception | None = None
        try:
            action()
        except (OSError, SafetensorError, RuntimeError) as error:
            if not could_not_write(error):
                raise
            failed = error
        count = torch.tensor(float(failed is not None), device=self.accelerator.device)
        if self.accelerator.reduce(count, "sum") > 0:
            reason = "another rank could not write" if failed is None else first_line(failed)
            raise WriteError(
                f"{checkpoint} could not be saved: {reason}. Earlier checkpoints are untouched. "
                "Make room (save_total_limit keeps fewer of them), then go on with --resume."
            ) from failed


def could_not_write(error: BaseException) -> bool:
    """Tell a disk that is full or refuses from other errors, whichever library met it."""
    text = str(error)
    if isinstance(error, OSError):
        return error.errno in (*DISK_FULL, errno.EIO, errno.EROFS)
    if isinstance(error, SafetensorError):
        return "os error" in text or "I/O" in text
    # What torch.save says when fewer bytes were written than it gave.
    return isinstance(error, RuntimeError) and (
        "inline_container" in text or "PytorchStreamWriter" in text
    )


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
