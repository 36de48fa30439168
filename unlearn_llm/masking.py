"""A mask inside the Trainer's step: the passes it is chosen from, what it holds, checkpoints."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from unlearn_llm.dataset import ORIGINAL, RoleDataset
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.masks import Mask
from unlearn_llm.rows import QA
from unlearn_llm.scoring import score
from unlearn_llm.types import ROLES, Role

if TYPE_CHECKING:
    from unlearn_llm.trainer import UnlearnTrainer

FILE = "unlearn_mask.pt"
logger = logging.get_logger(__name__)


class Masking(TrainerCallback):
    """Holds entries of the weights in the steps that a mask names, whatever the optimiser is.

    Their gradient is set to 0 before clipping, as SFRon's released code does, so the norm is that
    of the gradient which is used. That alone would not hold them: weight decay, momentum of other
    steps and the base of DualOptim+ move entries whose gradient is 0. So they get back, after the
    optimiser's step, the value from before it, which takes a copy of the weights while it lasts.

    Attributes:
        mask: Of the shape of each trainable parameter, bool (one byte per entry), True where it
            may move; empty until `prepare`, and without a mask.
    """

    def __init__(self, mask: Mask | None, name: str | None, trainer: "UnlearnTrainer") -> None:
        """Connect.

        Args:
            name: What a checkpoint calls the mask; None: there is none, and nothing is held.
        """
        self.chooser = mask
        self.name = name
        self.trainer = trainer
        self.mask: list[Tensor] = []
        self.rows: RoleDataset | None = None
        self._before: list[Tensor] = []

    def encode(self, forget: Sequence[QA], retain: Sequence[QA], encoder: Encoder) -> None:
        """Encode the original answers, which an objective such as idk+ap does not read."""
        if self.chooser is not None:
            self.rows = RoleDataset.encode(
                {"forget": forget, "retain": retain},
                encoder,
                dict.fromkeys(ROLES, (ORIGINAL,)),
                refusals=(),
                seed=0,
            )

    def prepare(self, checkpoint: Path | None) -> None:
        """Choose the mask at the weights as they are, or read it beside a checkpoint.

        Raises:
            UserError: the checkpoint was made with another mask, or with none.
        """
        if checkpoint is not None:
            self._read(checkpoint)
        elif self.chooser is not None:
            assert self.rows is not None  # encoded with the chooser
            chosen = self.chooser.choose(RowGradients(self.trainer, self.rows))
            # Sums over ranks may round differently on another rank; the mask must not.
            self.mask = [broadcast(part.view(torch.uint8)).bool() for part in chosen]
        if self.mask:
            free, entries = sum(int(m.sum()) for m in self.mask), sum(m.numel() for m in self.mask)
            logger.info(f"mask: {self.name} lets {free} of {entries} entries move")

    # The step, for the Trainer.

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of held entries to 0, in steps in which they are held."""
        if self._holds():
            for parameter, mask in zip(self._parameters, self.mask, strict=True):
                if parameter.grad is not None:
                    # A product: 0 times infinity is no number, and still stops the run.
                    parameter.grad.mul_(mask)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights from before a step that holds some of them."""
        if self._holds():
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give held entries their value back."""
        if self._holds():
            parts = zip(self._parameters, self.mask, self._before, strict=True)
            for parameter, mask, before in parts:
                torch.where(mask, parameter, before, out=parameter.data)
            self._before = []

    @property
    def _parameters(self) -> list[Tensor]:
        return self.trainer.combining.parameters

    def _holds(self) -> bool:
        if self.chooser is None:
            return False
        roles = self.trainer.schedule.roles(self.trainer.state.global_step)
        return any(role in self.chooser.roles for role in roles)

    # Checkpoints.

    def write(self, folder: Path) -> None:
        """Write the mask beside a checkpoint, one bit per entry, whole or not at all."""
        if self.chooser is None:
            return
        bits = [torch.from_numpy(np.packbits(part.cpu().numpy())) for part in self.mask]
        unfinished = folder / f"{FILE}.tmp"
        torch.save({"mask": self.name, "bits": bits}, unfinished)
        os.replace(unfinished, folder / FILE)

    def _read(self, folder: Path) -> None:
        file = folder / FILE
        saved: dict[str, Any] = {"mask": None, "bits": []}
        if file.is_file():
            saved = torch.load(file, weights_only=True)
        if saved["mask"] != self.name:
            raise UserError(
                f"{folder} was made with mask={saved['mask']!r}, this run has {self.name!r}. "
                "Resume with the same settings, or start anew."
            )
        if self.chooser is not None:
            pairs = zip(saved["bits"], self._parameters, strict=True)
            self.mask = [_unpacked(bits, parameter) for bits, parameter in pairs]


class RowGradients:
    """Gradients over all rows of a role, shared out among the ranks; see masks.Gradients."""

    def __init__(self, trainer: "UnlearnTrainer", rows: RoleDataset) -> None:
        self.trainer = trainer
        self.rows = rows

    def mean(self, role: Role) -> list[Tensor]:
        """Gradient of the token mean of S; batches as large as those of training."""
        labels = (row.labels for row in self.rows.rows[role].encoded[ORIGINAL])
        scored = sum(sum(label >= 0 for label in row[1:]) for row in labels)
        for logp in self._scores(role, self.trainer.args.per_device_train_batch_size):
            (-logp.sum() / scored).backward()
        return self._reduced(self._taken())

    def mean_square(self, role: Role) -> list[Tensor]:
        """Mean over rows of the squared gradient of S; one row at a time."""
        found = [torch.zeros_like(parameter) for parameter in self._parameters]
        for logp in self._scores(role, 1):
            (-logp.sum()).backward()
            for total, gradient in zip(found, self._taken(), strict=True):
                total.addcmul_(gradient, gradient)
        n_rows = len(self.rows.rows[role])
        return [total.div_(n_rows) for total in self._reduced(found)]

    @property
    def _parameters(self) -> list[Tensor]:
        return self.trainer.combining.parameters

    def _scores(self, role: Role, batch_size: int) -> Iterator[Tensor]:
        """(B,) log-probabilities of the original answers of this rank's rows, without dropout."""
        trainer, rows = self.trainer, self.rows.rows[role]
        model: Any = trainer.model
        ranks, rank = trainer.args.world_size, trainer.args.process_index
        # Longest first: batches need little padding, and memory runs out at once or never.
        mine = sorted(range(len(rows)), key=lambda row: rows.lengths[row], reverse=True)[
            rank::ranks
        ]
        starts = tqdm(
            range(0, len(mine), batch_size),
            desc=f"mask: gradients of the {role} set",
            disable=trainer.args.disable_tqdm or not trainer.accelerator.is_main_process,
            leave=False,
        )
        was_training = model.training
        model.eval()
        for start in starts:
            samples = [rows[row][ORIGINAL] for row in mine[start : start + batch_size]]
            batch: Any = {ORIGINAL: trainer.collator.sequences(samples)}
            inputs: Any = trainer._prepare_inputs(batch)
            with trainer.accelerator.autocast():
                logp = score(model, inputs)[ORIGINAL].logp
            yield logp
        model.train(was_training)

    def _taken(self) -> list[Tensor]:
        """The gradients, taken off the parameters."""
        found = []
        for parameter in self._parameters:
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return found

    def _reduced(self, partial_sums: list[Tensor]) -> list[Tensor]:
        return [self.trainer.accelerator.reduce(part, "sum") for part in partial_sums]


def _unpacked(bits: Tensor, parameter: Tensor) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=math.prod(parameter.shape)).astype(bool)
    return torch.from_numpy(flat).view(parameter.shape).to(parameter.device)
