"""`unlearn demo`: a small Llama learns generated authors, then forgets some. No hub, no network."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.dataset import read_refusals
from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import Evaluation, evaluate
from unlearn_llm.evaluation.records import Record, write_json, write_whole
from unlearn_llm.evaluation.report import side_by_side
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.finetune import FinetuneConfig, finetune
from unlearn_llm.folders import check_output
from unlearn_llm.models import NewModel, new_model, new_tokenizer
from unlearn_llm.rows import QA, load_rows, to_pairs
from unlearn_llm.trainer import UnlearnTrainer

OBJECTIVE = "idk+gd"
NEW = NewModel(family="llama", hidden_size=128, layers=4, heads=4, vocabulary=1200, context=128)
SCORES = ("UFE", "TFE", "MU18", "OVR", "forget_quality")
"""Shown in the table; a score made with a proxy has a longer name."""


@dataclass
class Demo:
    """What the stages hand on."""

    output: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        self.console.print(f"[bold]{title}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def run_demo(output: Path) -> dict[str, Any]:
    """Train a target and a gold model, unlearn twice, evaluate all, show what became of it.

    Args:
        output: Folder for models, records and scores.

    Returns:
        {"rows": {name: {score: value or None}}, "seconds": {stage: s}}.
    """
    check_output(output, "--output")
    demo = Demo(output, Console())
    logging.set_verbosity_error()
    torch.manual_seed(0)
    pairs = {name: _pairs(name) for name in ("full", "forget10", "retain90")}
    # A model that people use knows how to refuse; this one at least has the words.
    texts = [text for pair in pairs["full"] for text in pair[:2]] + read_refusals()
    tokenizer = new_tokenizer(texts, NEW.vocabulary)
    encoder = Encoder(tokenizer, "plain", max_length=NEW.context)

    demo.console.print(
        f"A small Llama learns {len(pairs['full'])} rows about fictitious authors; then it has to "
        f"forget {len(pairs['forget10'])} of them ({OBJECTIVE}) and keep the rest."
    )
    with demo.stage("target", "1/5 Teach it everything (the model before)"):
        target = _learn(demo, tokenizer, encoder, pairs["full"], "before")
    with demo.stage("gold", "2/5 Teach another one everything but the forget set (gold)"):
        gold = _learn(demo, tokenizer, encoder, pairs["retain90"], "gold")
    with demo.stage("evaluate", "3/5 Ask both"):
        # Gold first: forget quality compares the others with its records.
        of_gold = _ask(demo, "gold", gold, encoder)
        demo.evaluations["before"] = _ask(demo, "before", target, encoder)
        demo.evaluations["gold"] = of_gold
    before = {name: weights.clone() for name, weights in target.state_dict().items()}
    for number, (name, optimizer) in enumerate(
        (("alternate", None), ("DualOptim+", "dual_adamw_plus")), start=4
    ):
        target.load_state_dict(before)
        with demo.stage(name, f"{number}/5 Forget with {name}"):
            _forget(demo, target, tokenizer, encoder, pairs, name, optimizer)
            demo.evaluations[name] = _ask(demo, name, target, encoder)

    summary = _summary(demo)
    write_json(output / "summary.json", summary)
    _show(demo)
    return summary


def _refusals(demo: Demo) -> Path:
    """A few of the refusals: a model that never refused before cannot learn a hundred at once."""
    path = demo.output / "refusals.txt"
    if not path.is_file():
        write_whole(path, "\n".join(read_refusals()[:3]) + "\n")
    return path


def _pairs(split: str) -> list[QA]:
    return to_pairs(load_rows(f"synthetic/{split}"), split)


def _learn(
    demo: Demo,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    pairs: Sequence[QA],
    name: str,
) -> PreTrainedModel:
    args = FinetuneConfig(
        output_dir=str(demo.output / name),
        per_device_train_batch_size=16,
        num_train_epochs=25,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.95,
        logging_strategy="no",
        disable_tqdm=False,  # the verbosity set above would switch the bars off
        use_cpu=True,
    )
    trainer = finetune(new_model(NEW, tokenizer), tokenizer, pairs, encoder, args)
    model: Any = trainer.model
    _save(demo, model, tokenizer, name)
    return model


def _forget(
    demo: Demo,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    pairs: dict[str, list[QA]],
    name: str,
    optimizer: str | None,
) -> None:
    args = UnlearnConfig(
        output_dir=str(demo.output / name),
        objective=OBJECTIVE,
        schedule="alternate",
        optimizer=optimizer,
        optimizer_parameters={} if optimizer is None else {"max_update": 1.0},
        per_device_train_batch_size=20,
        max_steps=240,
        learning_rate=1e-3,
        forget_learning_rate=2e-3,
        warmup_steps=6,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=False,  # the verbosity set above would switch the bars off
        use_cpu=True,
    )
    trainer = UnlearnTrainer(
        model,
        args,
        forget_dataset=pairs["forget10"],
        retain_dataset=pairs["retain90"],
        processing_class=tokenizer,
        encoder=encoder,
        refusals=read_refusals(_refusals(demo)),
    )
    trainer.train()
    _save(demo, model, tokenizer, name)


def _save(demo: Demo, model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    # Not Trainer.save_model, which adds its arguments as a pickle.
    logging.disable_progress_bar()  # a bar for one small file
    model.save_pretrained(demo.output / name)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(demo.output / name)


def _ask(demo: Demo, name: str, model: PreTrainedModel, encoder: Encoder) -> Evaluation:
    refusals = str(_refusals(demo))
    suite = Suite.load("synthetic", objective_kind="targeted", refusals=refusals)
    gold = demo.output / "gold" if name != "gold" else None
    return evaluate(suite, model, encoder, demo.output / name, reference_records=gold)


def _shown_names(demo: Demo) -> list[str]:
    """Give the full names of the scores to show, proxies included."""
    names = demo.evaluations["before"].scores
    return [name for name in names if name.removesuffix("_proxy") in SCORES]


def _summary(demo: Demo) -> dict[str, Any]:
    return {
        "rows": {
            name: {score: evaluation.scores[score].value for score in _shown_names(demo)}
            for name, evaluation in demo.evaluations.items()
        },
        "seconds": demo.seconds,
    }


def _show(demo: Demo) -> None:
    """Print the table, three answers before and after, and where everything lies."""
    details = {name: evaluation.details for name, evaluation in demo.evaluations.items()}
    names = _shown_names(demo)
    headers = [name.replace("_proxy", "\n_proxy").replace("forget_", "forget\n") for name in names]
    shown = Table("", *headers, "seconds", title=f"Forget 10 % of the authors: {OBJECTIVE}")
    seconds = {**demo.seconds, "before": demo.seconds["target"]}
    for model, scores in side_by_side(details, names).items():
        shown.add_row(model, *(scores[n]["text"] for n in names), f"{seconds[model]:.0f}")
    demo.console.print(shown)
    demo.console.print(
        "UFE, TFE: forgotten (up). MU: kept (up). OVR: both. Forget quality: p-value against gold. "
        "A name with _proxy counts words in place of a judge model: not comparable with papers.\n"
    )
    before, after = (demo.evaluations[name].records for name in ("before", "DualOptim+"))
    asked = [r for r in zip(before, after, strict=True) if r[0]["probe"] in ("forget", "retain")]
    forget = [pair for pair in asked if pair[0]["probe"] == "forget"]
    retain = [pair for pair in asked if pair[0]["probe"] == "retain"]
    for role, (old, new) in (("forget", forget[0]), ("forget", forget[-1]), ("retain", retain[0])):
        _print_answer(demo.console, role, old, new)
    demo.console.print(f"Models, records.jsonl, scores.json: {demo.output}/<model>")


def _print_answer(console: Console, role: str, before: Record, after: Record) -> None:
    console.print(f"[bold]{role}[/bold]  {before['question']}", highlight=False)
    for label, record in (("before", before), ("after", after)):
        console.print(f"  {label:7}", record["generation"]["text"], highlight=False, markup=False)
