"""Ordinary fine-tuning with the plain Trainer: makes target models and gold models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.rows import QA
from unlearn_llm.saving import SavingTrainer
from unlearn_llm.types import IGNORE_INDEX


@dataclass
class FinetuneConfig(TrainingArguments):
    """TrainingArguments with the defaults of a small, silent, offline run."""

    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    save_strategy: str = "no"
    report_to: str | list[str] | None = field(default="none")


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[QA],
    encoder: Encoder,
    args: TrainingArguments,
) -> Trainer:
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

    trainer = SavingTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer
