"""Ordinary fine-tuning with the plain Trainer: makes target models and gold models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.rows import QA
from unlearn_llm.saving import SavingTrainer
from unlearn_llm.types import IGNORE_INDEX

ORDER = "unlearn_order.pt"


@dataclass
class FinetuneConfig(TrainingArguments):
    """TrainingArguments with the defaults of a small, silent, offline run."""

    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    save_strategy: str = "no"
    report_to: str | list[str] | None = field(default="none")


class FinetuneTrainer(SavingTrainer):
    """The plain Trainer, but a run resumed in mid-epoch goes on with that epoch's order of rows.

    The Trainer draws the order from torch's generator when an epoch begins, and puts a checkpoint's
    generator back only after the rows that are skipped. So checkpoints keep both.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Make a Trainer; see Trainer."""
        super().__init__(*args, **keywords)
        self.order = _Order()
        self.add_callback(self.order)

    def write_beside(self, checkpoint: Path) -> None:
        """Write the generator's state from which the order of the epoch under way comes."""
        at_the_end = float(self.state.epoch or 0).is_integer()
        state = torch.get_rng_state() if at_the_end else self.order.drawn_from
        torch.save(state, checkpoint / ORDER)

    def train(  # type: ignore[override]  # the rest is passed on as it is
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> TrainOutput:
        """Train; see SavingTrainer.train."""
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None:
            self.order.to_restore = torch.load(checkpoint / ORDER, weights_only=True)
        return super().train(str(checkpoint) if checkpoint else None, **keywords)


class _Order(TrainerCallback):
    """Notes the generator's state when an epoch begins, or puts back the one of a checkpoint."""

    drawn_from: torch.Tensor
    to_restore: torch.Tensor | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.to_restore is not None:
            torch.set_rng_state(self.to_restore)
            self.to_restore = None
        self.drawn_from = torch.get_rng_state()


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[QA],
    encoder: Encoder,
    args: TrainingArguments,
) -> FinetuneTrainer:
    """Fine-tune a model on questions and answers; the loss is taken on the answers.

    Returns:
        The Trainer after training, with the trained model in `trainer.model`.
    """
    encoded = encoder.pairs([p.question for p in pairs], [p.answer for p in pairs])
    # From memory: data sets built from files would leave a copy in the data-set cache.
    dataset = Dataset.from_list(
        [{"input_ids": e.ids, "labels": e.labels, "length": len(e.ids)} for e in encoded]
    )
    collator = Collator(int(tokenizer.pad_token_id))

    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": collator.pad(ids, collator.pad_id),
            "attention_mask": collator.pad([[1] * len(tokens) for tokens in ids], 0),
            "labels": collator.pad([sample["labels"] for sample in samples], IGNORE_INDEX),
        }

    trainer = FinetuneTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer
