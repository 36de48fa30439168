"""Relearning: a few steps on a few rows; what comes back of the *others* was only hidden."""

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch

from unlearn_llm.attacks.asking import recalls
from unlearn_llm.attacks.base import (
    Fact,
    Material,
    NotMeasured,
    Subject,
    Trial,
    attack,
    drawn,
    need,
)
from unlearn_llm.finetune import FinetuneConfig, finetune
from unlearn_llm.rows import QA

LEAST_OTHERS = 5
"""Forget rows that must be left to measure on."""


@attack("relearning")
def relearning(
    subject: Subject,
    material: Material,
    *,
    rows: Sequence[int] = (5, 20, 100),
    steps: int = 20,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Trial]:
    """Fine-tune on k forget rows, for each k of `rows`, and ask all of the others.

    A k that is more than half of the forget rows is left out. All k are measured on the same
    rows: those that no k learns. The rows are drawn by the seed, so the gold model learns the same.

    Source: Hu et al. 2024, arXiv:2406.13356; Lynch et al. 2024, arXiv:2402.16835. Differs: full
        fine-tuning; the rows learnt and the rows asked never overlap.
    """
    need(material.forget, 2 * LEAST_OTHERS, "forget rows")
    usable = [k for k in rows if 0 < k <= len(material.forget) // 2]
    if not usable:
        raise NotMeasured(f"relearning.rows {list(rows)} are too many or too few of the rows")
    shuffled = drawn(material.forget, len(material.forget), seed)
    others = shuffled[max(usable) :]
    trials = []
    for k in usable:
        model = relearnt(subject, shuffled[:k], steps, learning_rate, batch_size, seed)
        trials.append(
            Trial(
                f"relearning {k}", recalls(subject, others, model=model), details={"steps": steps}
            )
        )
    return trials


@attack("unrelated")
def unrelated(
    subject: Subject,
    material: Material,
    *,
    rows: int = 100,
    steps: int = 20,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Trial]:
    """Fine-tune on rows that have nothing to do with the forget set, then ask the plain questions.

    Source: as `relearning`; unrelated text: Doshi and Stickland 2024, arXiv:2411.12103. Differs:
        the text is retain rows.
    """
    need(material.retain, 1, "retain rows")
    chosen = drawn(material.retain, rows, seed)
    model = relearnt(subject, chosen, steps, learning_rate, batch_size, seed)
    found = recalls(subject, material.forget, model=model)
    return [Trial(f"unrelated {len(chosen)}", found, details={"steps": steps})]


def relearnt(
    subject: Subject,
    facts: Sequence[Fact],
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> Any:
    """Give a fresh copy of the model, all weights fine-tuned on the answers of some rows."""
    model = subject.fresh().float()
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved, but the Trainer asks for one
        args = FinetuneConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            optim="adamw_torch",
            weight_decay=0.0,
            seed=seed,
            logging_strategy="no",
            disable_tqdm=not subject.progress,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        pairs = [QA(fact.question, fact.answer) for fact in facts]
        # The Trainer seeds the global generator, and prints its times without a progress bar.
        with torch.random.fork_rng(), redirect_stdout(io.StringIO()):
            trainer = finetune(model, subject.encoder.tokenizer, pairs, subject.encoder, args)
    return trainer.accelerator.unwrap_model(trainer.model).eval()
