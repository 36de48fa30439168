"""What leaks.py runs. DATA stands for the folder of leaks_data.py."""

from typing import Any, NamedTuple

OVERRIDES = {
    "folder": "DATA",
    "max_new_tokens": 16,
    "proxies": True,
    "limit": "all",
    "intervals": None,
}
SUITE = ("--suite", "tofu", "folder=DATA", "max_new_tokens=16", "proxies=true", "limit=all")
GOLD = "gold/evaluation/records.jsonl"
MEAN = {"aggregate": "mean", "options": {"probe": "forget", "metric": "rouge"}}
MADE: dict[str, Any] = {"use_cpu": True, "logging_steps": 1, "save_strategy": "steps"}
DATA = {"folder": "DATA", "template": "plain", "max_length": 128}
RECIPES: dict[str, dict[str, Any]] = {
    "target.yaml": {
        "kind": "finetune",
        "model": {
            "new": {
                "family": "llama", "hidden_size": 64, "layers": 2, "heads": 2,
                "vocabulary": 400, "context": 256,
            },
        },
        "data": {**DATA, "train": ["tofu/forget10", "tofu/retain90"]},
        "train": {
            **MADE, "output_dir": "target", "max_steps": 150, "learning_rate": 5.0e-3,
            "per_device_train_batch_size": 8, "save_steps": 100,
        },
        "evaluate": {"suite": "tofu", "overrides": OVERRIDES},
    },
    "unlearn.yaml": {
        "model": {"path": "target"},
        "data": {**DATA, "forget": "tofu/forget10", "retain": "tofu/retain90"},
        "train": {
            **MADE, "output_dir": "run", "objective": "npo+gd", "max_steps": 4, "save_steps": 2,
            "per_device_train_batch_size": 4, "schedule_parameters": {"forget": 1, "retain": 1},
            "learning_rate": 1.0e-3, "eval_strategy": "steps", "eval_steps": 2,
        },
        "evaluate": {
            "suite": "tofu", "overrides": OVERRIDES, "during": {"limit": 3}, "reference": GOLD,
            "target": "target/evaluation/records.jsonl",
        },
    },
    "no_such_rows.yaml": {
        "name": "no_such_rows",
        "probes": {
            "forget": {
                "source": "DATA/forget10.json", "where": {"author": "nobody"}, "metrics": ["rouge"],
            },
        },
        "scores": {"rouge": MEAN},
    },
    "no_such_column.yaml": {
        "name": "no_such_column",
        "probes": {"forget": {"source": "DATA/columns.jsonl", "metrics": ["rouge"]}},
        "scores": {"rouge": MEAN},
    },
}  # fmt: skip


class Command(NamedTuple):
    """One command line.

    Attributes:
        name: Of its logs, too.
        words: After `unlearn`.
        codes: How it may end; minus a signal's number for one that is killed.
        needs: Commands whose results it reads.
        fault: What goes wrong on the way (leaks_runs.FAULTS).
        ranks: Processes; torchrun starts several, and ends with 1 if one of them fails.
        of_texts: What it writes is rows, asked for as such: for their owner alone.
        shows: It is told to write texts for all. Runs only if it is named: then words are found.
    """

    name: str
    words: tuple[str, ...]
    codes: tuple[int, ...] = (0,)
    needs: tuple[str, ...] = ("target", "gold")
    fault: str | None = None
    ranks: int = 1
    of_texts: str | None = None
    shows: bool = False


def _train(name: str, *overrides: str, **keywords: Any) -> Command:
    words = ("train", "DATA/unlearn.yaml", f"train.output_dir={name}", *overrides)
    return Command(name, words, **keywords)


def _refused(name: str, *overrides: str) -> Command:
    return _train(name, *overrides, "evaluate=null", "train.eval_strategy=no", codes=(2,))


ON_JOINT = ("train.schedule=joint", "train.schedule_parameters={}")
RUN = ("dpo+kl",)
LISTED = [
    Command("target", ("finetune", "DATA/target.yaml"), needs=()),
    Command(
        "gold",
        (
            "finetune", "DATA/target.yaml", "train.output_dir=gold", "train.max_steps=20",
            "data.train=[tofu/retain90]", "data.tokenizer_rows=[tofu/forget10, tofu/retain90]",
        ),
        needs=(),
    ),
    _train("dpo+kl", "train.objective=dpo+kl", "train.optimizer=dual_adamw_plus"),
    _train("npo+gd", "train.optimizer=dual_adamw", "train.optimizer_parameters={state_bits: 8}",
           "train.report_to=tensorboard"),
    _train("altpo+ap", "train.objective=altpo+ap"),
    _train("llmu", "train.objective=llmu+gd_kl", "train.averaging=micro_batch"),
    _train("lora", "train.objective=me+gd", "model.lora={r: 4}", "train.reference=precomputed"),
    _train("rmu", "train.objective=rmu+embed_diff", "train.forget_parameters={layers: [1]}",
           "train.retain_parameters={layers: [1]}"),
    _train("masked", "train.objective=idk+gd", "train.mask=salun"),
    _train("pdu", "train.combine=pdu", *ON_JOINT),
    Command("finished", ("train", "DATA/unlearn.yaml", "train.output_dir=dpo+kl",
                         "train.objective=dpo+kl", "train.optimizer=dual_adamw_plus", "--resume"),
            needs=("target", "gold", *RUN)),
    Command("eval", ("eval", "target", "dpo+kl", "dpo+kl/checkpoint-2", *SUITE, "--reference", GOLD,
                     "--all", "--output", "evaluated"), needs=("target", "gold", *RUN)),
    Command("eval as JSON", ("eval", "gold", *SUITE, "--json", "--output", "as_json")),
    Command("open_unlearning", ("eval", "target", "--suite", "open_unlearning", "folder=DATA",
                                "max_new_tokens=16", "limit=all", "--output", "evaluated")),
    Command("privacy", ("eval", "target", "--suite", "privacy", "folder=DATA", "intervals=null",
                        "--output", "evaluated")),
    Command("plot ROC", ("plot", "--roc", "evaluated/privacy/target", "--output", "roc.svg"),
            needs=("privacy",)),
    Command("recompute", ("eval", "--from", "target/evaluation/records.jsonl", "--from",
                          "gold/evaluation", "--intervals")),
    Command("compare", ("compare", "target/evaluation", "gold/evaluation", "--all",
                        "intervals.resamples=100")),
    Command("leaderboard", ("leaderboard", ".", "--output", "table.md")),
    Command("leaderboard as CSV", ("leaderboard", "dpo+kl", "--output", "table.csv"),
            needs=("target", "gold", *RUN)),
    Command("export", ("export", "target", "--format", "open-unlearning", "--output", "log.json"),
            codes=(0, 2)),
    Command("export as CSV", ("export", "target", "--format", "tofu-csv", "--reference", GOLD,
                              "--output", "tofu.csv")),
    Command("export as card", ("export", "target", "--format", "model-index",
                               "--output", "card.md")),
    Command("import", ("import", "DATA/TOFU_EVAL.json", "--output", "imported"), needs=()),
    Command("plot", ("plot", "dpo+kl", "--output", "plot.svg"), needs=("target", "gold", *RUN)),
    Command("attack", ("attack", "dpo+kl", "--gold", "gold", "--output", "attacked",
                       "--max-new-tokens", "16", "sampling.samples=2",
                       "--attacks", "plain,probability,paraphrase,prefix,sampling,probing"),
            needs=("target", "gold", *RUN)),
    Command("generate-alternates", ("generate-alternates", "DATA/unlearn.yaml",
                                    "alternates.jsonl", "--repeats", "1",
                                    "--max-new-tokens", "8"), of_texts="alternates.jsonl"),
    Command("export-tasks", ("export-tasks", "target", "tasks", "folder=DATA", "limit=all"),
            of_texts="tasks"),
    Command("lm-eval", ("eval", "target", "--suite", "downstream", "tasks=[tofu_forget_generation]",
                        "task_folders=[tasks]", "--output", "evaluated"), needs=("export-tasks",)),
    Command("negate", ("negate", "gold", "target", "negated")),
    Command("second request", ("train", "DATA/unlearn.yaml", "train.output_dir=second",
                               "data.forget=DATA/second.json", "evaluate=null",
                               "data.retain=DATA/world_facts_perturbed.json",
                               "train.eval_strategy=no", "--continue-from", "dpo+kl"),
            needs=("target", "gold", *RUN)),
    Command("requests", ("requests", "second"), needs=("second request",)),
    Command("release", ("release", "second", "released"), needs=("second request",)),
    Command("merge", ("merge", "lora", "merged"), needs=("lora",)),
    Command("plan", ("plan", "DATA/unlearn.yaml", "--hardware", "H100"), needs=("target",)),
    Command("env", ("env",), needs=()),
    Command("list", ("list",), needs=()),
    Command("show", ("show", "DATA/unlearn.yaml"), needs=()),
    Command("copy", ("copy", "DATA/unlearn.yaml", "copied.yaml"), needs=()),
    # What is refused.
    *(
        _refused(name.partition(".")[0], f"data.forget=DATA/{name}")
        for name in ("no_text.jsonl", "no_answer.jsonl", "surrogate.jsonl", "long.jsonl",
                     "columns.jsonl", "chat.jsonl", "torn.jsonl", "latin.jsonl", "no_header.csv",
                     "table.parquet")
    ),
    _refused("overlap", "data.retain=tofu/forget10"),
    Command("no such rows", ("eval", "target", "--suite", "DATA/no_such_rows.yaml"), (2,)),
    Command("no such column", ("eval", "target", "--suite", "DATA/no_such_column.yaml"), (2,)),
    Command("long for the suite", ("eval", "target", *SUITE, "data.max_length=12"), (2,)),
    # What goes wrong on the way.
    _train("NaN", "train.learning_rate=1e30", "train.max_grad_norm=0", codes=(3,)),
    _train("killed while saving", codes=(-9,), fault="killed while saving"),
    _train("told to go", codes=(143,), fault="told to go"),
    _train("interrupted", codes=(130,), fault="interrupted"),
    _train("disk full", codes=(5,), fault="disk full"),
    _train("two ranks", "train.objective=dpo+kl", ranks=2),
    _train("NaN on two ranks", "train.learning_rate=1e30", "train.max_grad_norm=0",
           codes=(1,), ranks=2),
    Command("killed while evaluating", ("eval", "target", *SUITE, "--output", "killed"), (-9,),
            fault="killed while evaluating"),
    Command("killed while writing", ("eval", "target", *SUITE, "--output", "killed"), (-9,),
            fault="killed while writing"),
    Command("resumed", ("train", "DATA/unlearn.yaml", "train.output_dir=killed while saving",
                        "--resume"), needs=("target", "gold", "killed while saving")),
    Command("shown", ("eval", "target", *SUITE, "--show-forget-text", "--output", "shown"),
            shows=True),
    _train("wrong tokenizer", "model.tokenizer=DATA/tokenizer", codes=(1, 2)),
]  # fmt: skip
NOT_RUN = {"demo": "its rows are generated, and nothing can be planted in them"}
"""Words of the command line that stand in no command, with the reason."""
COMMANDS = {command.name: command for command in LISTED}
