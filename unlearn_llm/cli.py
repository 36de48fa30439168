"""The command `unlearn`. Only words here: what a command does is in pipeline.py.

torch and transformers are imported inside the commands, after what can be checked without them.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn_llm import cli_attack, cli_env, cli_reports, cli_requests, recipe_files
from unlearn_llm.cli_faults import told_in_one_line
from unlearn_llm.errors import UserError
from unlearn_llm.safe_text import printable

if TYPE_CHECKING:
    from unlearn_llm.pipeline import Run
    from unlearn_llm.recipe import Recipe

app = typer.Typer(
    name="unlearn",
    help="Make a language model forget what it must no longer know, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_reports.commands)
app.add_typer(cli_attack.commands)
app.add_typer(cli_env.commands)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or a name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace settings, such as train.seed=2."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run, however far it came.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run's results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
AllScores = Annotated[bool, typer.Option("--all", help="Show the members of the composites too.")]


def main() -> None:
    """Run the command line; mistakes of the user become one line on stderr."""
    # A console script does not look here, but a recipe may name "my_losses:my_ga".
    sys.path.insert(0, os.getcwd())
    # Said at every import on some CPUs, of a kernel that only 4-bit training there would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with told_in_one_line():
        code = app(standalone_mode=False)
        if code == 130:  # typer has caught Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a reader that has gone is no fault
        sys.exit(code or 0)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    continue_from: cli_requests.ContinueFrom = None,
    as_json: AsJson = False,
) -> None:
    """Unlearn as a recipe says, and evaluate if it asks for that."""
    loaded = _load(recipe, cli_requests.continued(continue_from, overrides), resume, overwrite)
    from unlearn_llm.pipeline import run_train

    with _stdout_for_json(as_json):
        run = run_train(loaded, resume=resume, overwrite=overwrite)
    _show_run(loaded, run, as_json)


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model, or train a new one: makes targets to unlearn, and gold models."""
    loaded = _load(recipe, overrides, resume, overwrite)
    from unlearn_llm.pipeline import run_finetune

    with _stdout_for_json(as_json):
        run = run_finetune(loaded, resume=resume, overwrite=overwrite)
    _show_run(loaded, run, as_json)


@app.command()
def negate(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the model.")],
    finetuned: Annotated[
        Path,
        typer.Argument(
            metavar="FINETUNED", help="The same after `unlearn finetune` on the forget set."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder.")],
    alpha: Annotated[float, typer.Option(min=0.0, help="How much of it is subtracted.")] = 1.0,
) -> None:
    """Task arithmetic: subtract from a model what fine-tuning on the forget set has added."""
    from unlearn_llm.negate import negate as subtract

    subtract(base, finetuned, output, alpha)
    print(f"wrote {output}")


@app.command("generate-alternates")
def generate_alternates(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new .jsonl file.")],
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Alternates of every forget row.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a sample is cut.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Let a recipe's model make up other answers to its forget questions, for altpo."""
    loaded = _load(recipe, overrides)
    from unlearn_llm.pipeline import run_alternates

    count = run_alternates(
        loaded,
        file,
        repeats=repeats,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    print(f"wrote {count} rows to {file}")


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]... [KEY=VALUE]...",
            help="Folders or hub ids. KEY=VALUE replaces a field of the suite, or with "
            "model. or data. before it a setting of those sections (data.template=llama2).",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A name in eval/, or a .yaml file. For models: tofu if not given; with --from: "
            "the suite that made the records."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="records.jsonl of a model that never saw the forget set.")
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Recompute scores from records.jsonl, without a model."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for records.jsonl and scores.json, one folder per model.")
    ] = Path("outputs/evaluation"),
    overwrite: Overwrite = False,
    all_scores: AllScores = False,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Show the confidence intervals.")
    ] = False,
    show_forget_text: Annotated[
        bool,
        typer.Option("--show-forget-text", help="Write texts into records.jsonl, too, for all."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure models with a suite, side by side.

    Questions, answers and generations are written into private/ only.
    """
    overrides = [word for word in models or [] if "=" in word and not Path(word).exists()]
    names = [word for word in models or [] if word not in overrides]
    if bool(names) == bool(records):
        raise UserError("eval: give models, or --from records.jsonl; one of the two.")
    if records and output != Path("outputs/evaluation"):
        raise UserError("eval: --from writes nothing; leave --output out.")
    from unlearn_llm.evaluating import evaluate_models, recompute_records

    with _stdout_for_json(as_json):
        if records:
            found = recompute_records(records, suite, overrides, reference)
        else:
            found = evaluate_models(
                names, suite, overrides, reference, output, overwrite, show_forget_text
            )
    _show_scores(found, as_json, all_scores, intervals)


@app.command()
def demo(
    as_json: AsJson = False,
    output: Annotated[Path, typer.Option(help="Folder for models and scores.")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Teach a small model, make it forget, show what became of it. No network."""
    from unlearn_llm.demo import run_demo

    with _stdout_for_json(as_json):
        summary = run_demo(output)
    if as_json:
        print(json.dumps(summary, allow_nan=False))


@app.command("list")
def list_names(as_json: AsJson = False) -> None:
    """Name everything that a recipe may name, and the recipes."""
    import unlearn_llm.losses  # noqa: F401  registers the names of the losses
    from unlearn_llm.combine import COMBINATIONS
    from unlearn_llm.evaluation.metrics import METRICS
    from unlearn_llm.evaluation.suite import suites
    from unlearn_llm.masks import MASKS
    from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES
    from unlearn_llm.optim import OPTIMIZERS
    from unlearn_llm.schedule import SCHEDULES

    found: dict[str, Any] = {
        "objectives": {"forget": list(FORGET_LOSSES), "retain": list(RETAIN_LOSSES)},
        "schedules": list(SCHEDULES),
        "combines": list(COMBINATIONS),
        "masks": list(MASKS),
        "optimizers": list(OPTIMIZERS),
        "metrics": list(METRICS),
        "suites": list(suites()),
        "recipes": recipe_files.names(),
    }
    if as_json:
        print(json.dumps(found))
        return
    sides = found.pop("objectives")
    recipes = found.pop("recipes")
    losses = (("forget losses", sides["forget"]), ("retain losses", sides["retain"]))
    for kind, names in (*losses, *found.items()):
        print(f"{kind:14} {', '.join(names)}")
    print("recipes", *recipe_files.summary(), sep="\n  ")
    print(f"{len(recipes)} recipes; `unlearn list --json` names each.")


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe by itself, resolved: its YAML, with the scores it should reach."""
    print(_load(recipe, overrides).to_yaml(), end="")


@app.command()
def copy(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new .yaml file.")],
    overrides: Overrides = None,
) -> None:
    """Write a recipe by itself into a file, to be edited."""
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"copy: expected a file that ends in .yaml, got {file}.")
    if file.exists():
        raise UserError(f"copy: {file} exists; give another name.")
    text = _load(recipe, overrides).to_yaml(str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")


def _load(
    name: str, overrides: list[str] | None, resume: bool = False, overwrite: bool = False
) -> "Recipe":
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces it; give one of them.")
    recipe_files.locate(name)  # a mistyped name is told before transformers is imported
    from unlearn_llm.recipe import Recipe

    return Recipe.load(name, overrides or [])


def _show_run(recipe: "Recipe", run: "Run", as_json: bool) -> None:
    from unlearn_llm.published import compare

    evaluation = run.evaluation
    compared = compare(recipe.published, evaluation.scores) if evaluation else []
    if not _is_first_process():
        return
    if as_json:
        result = {
            "folder": str(run.folder),
            "scores": evaluation.details["scores"] if evaluation else None,
            "published": [asdict(score) for score in compared],
            "warning": run.warning,
        }
        print(json.dumps(result, allow_nan=False))
        return
    if evaluation is not None:
        _show_scores({run.folder.name: evaluation.details}, as_json=False)
    for score in compared:
        ours = "not measured" if score.ours is None else f"{score.ours:.4g}"
        within = f" (+-{score.tolerance:g})" if score.tolerance is not None else ""
        verdict = {True: ": reached", False: ": not reached", None: ""}[score.reached]
        print(f"{score.name} {ours}, published {score.published:g}{within}{verdict}")
    print(f"wrote {printable(str(run.folder))}", *filter(None, [run.warning]), sep="\n")


def _show_scores(
    found: dict[str, Any], as_json: bool, all_scores: bool = False, intervals: bool = False
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from unlearn_llm.evaluation.report import labels, side_by_side

    if not _is_first_process():
        return
    rows = side_by_side(found, intervals=intervals)
    if as_json:
        print(json.dumps(rows, allow_nan=False))
        return
    # One line per score: there are more scores than a terminal is wide.
    shown = Table("score")
    named = labels(list(rows))
    for name in rows:
        shown.add_column(Text(named[name]), justify="right")
    for score in next(iter(rows.values())):
        if all_scores or "/" not in score:
            shown.add_row(Text(score), *(scores[score]["text"] for scores in rows.values()))
    Console().print(shown)
    kinds = {name: details["suite"]["objective_kind"] for name, details in found.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{named[name]} {kind}" for name, kind in kinds.items())
        print(f"OVR is not comparable here ({listed}): give objective_kind=targeted for all, or")
        print("objective_kind=untargeted. A targeted OVR counts TFE.")
    for name, scores in rows.items():
        notes = {n: s["note"] for n, s in scores.items() if s["value"] is None and "/" not in n}
        for score, note in notes.items():
            print(f"{named[name]}: {score} not measured: {note}")


@contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """With --json, send what libraries print to stderr."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _is_first_process() -> bool:
    """Is this the process that speaks? (accelerate launch and torchrun set RANK)."""
    return os.environ.get("RANK", "0") == "0"
