"""Every method of the toolkit, 60 steps on the small TOFU model on a CPU: one table of all.

    python benchmarks/methods.py --tofu FOLDER [--output FOLDER] [--seeds 0] [--jobs 1]
                                 [--only NAME ...] [--into README.md | --json]

FOLDER holds TOFU's files. The methods are the recipes of tofu/small/methods. Finished runs are
kept, unless their recipe has changed: the command goes on where it was interrupted. Time is process
time with one thread.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from measured_run import measured_run
from small_tofu import (
    Row,
    cell,
    evaluate_if_missing,
    judges,
    summary,
    table_of,
    train_if_missing,
    without_judge,
)

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import write_json, write_whole
from unlearn_llm.recipe import Recipe
from unlearn_llm.recipe_files import locate, read_document

FAMILY = "tofu/small/methods"
SCORES = ("UFE", "TFE", "MU18", "OVR", "forget_quality")
ALTERNATES = "alternates.jsonl"
ROW = "row.json"
MARKS = ("<!-- methods -->", "<!-- /methods -->")
HEAD = ("forget loss", "retain loss", "s/step", "passes", "vectors")


class Task(NamedTuple):
    """One run to be done."""

    name: str
    seed: int
    tofu: Path
    output: Path

    @property
    def folder(self) -> Path:
        """Where its result lies."""
        return self.output / "methods" / f"{self.name}-{self.seed}"

    def recipe(self) -> Recipe:
        """The recipe as it is run here."""
        found = [
            f"data.folder={self.tofu}",
            f"model.path={self.output / 'target'}",
            f"train.output_dir={self.folder}",
            f"train.seed={self.seed}",
            f"evaluate.reference={self.output / 'methods' / 'gold' / 'records.jsonl'}",
        ]
        if Path(str(Recipe.load(f"{FAMILY}/{self.name}").data.forget)).name == ALTERNATES:
            found.append(f"data.forget={self.output / ALTERNATES}")
        return Recipe.load(f"{FAMILY}/{self.name}", found)


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("outputs/tofu-small"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--only", nargs="+", choices=names(), metavar="NAME", help="these methods")
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--into", type=Path, help="put the table into this file, at its marks")
    printed.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # for the processes of the runs

    chosen = given.only or names()
    prepare(given.tofu, given.output)
    tasks = [Task(n, seed, given.tofu, given.output) for seed in given.seeds for n in chosen]
    missing = [task for task in tasks if finished(task) is None]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for number, task in enumerate(pool.map(run, missing), start=1):
            print(f"{number} of {len(missing)}: {task.name}, seed {task.seed}", file=sys.stderr)
    table = {
        model: {"group": "models", **scores_of([given.output / "methods" / model])}
        for model in ("target", "gold")
    }
    for name in chosen:
        table[name] = row_of([task for task in tasks if task.name == name])
    if given.into:
        write_whole(given.into, with_table(given.into.read_text(encoding="utf-8"), table))
    else:
        print(json.dumps(table) if given.json else markdown(table))


def names() -> list[str]:
    """The methods, in the order of the recipe file."""
    path, _ = locate(FAMILY)
    return list(read_document(path)["variants"]["method"])


def prepare(tofu: Path, output: Path) -> None:
    """Make what the runs share: the two models, their evaluation, and alternates for altpo."""
    target, gold, data = output / "target", output / "gold", f"data.folder={tofu}"
    recipe = f"{FAMILY}/{names()[0]}"
    for folder in (target, gold):
        train_if_missing(folder, data)
    # Gold before the others: forget quality compares them with its records.
    evaluate_if_missing(gold, output / "methods" / "gold", recipe, [data], None)
    evaluate_if_missing(
        target, output / "methods" / "target", recipe, [data], output / "methods" / "gold"
    )
    if not (output / ALTERNATES).is_file():
        make_alternates(Recipe.load(recipe, [data, f"model.path={target}"]), output)


def make_alternates(recipe: Recipe, output: Path) -> None:
    """Let the target make up one alternate for every row.

    It reads 256 tokens only: of long answers it is shown the first 20 words.
    """
    from unlearn_llm.alternates import alternate_answers, write_pairs
    from unlearn_llm.encode import Encoder
    from unlearn_llm.models import load_model, load_tokenizer
    from unlearn_llm.recipe_rows import forget_and_retain

    pairs, _ = forget_and_retain(recipe.data)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.data.template, recipe.data.max_length)
    shown = [pair._replace(answer=" ".join(pair.answer.split()[:20])) for pair in pairs]
    made = alternate_answers(load_model(recipe.model), encoder, shown, repeats=1, max_new_tokens=50)
    answers = {pair.question: pair.answer for pair in pairs}
    whole = [pair._replace(answer=answers[pair.question]) for pair in made]
    write_pairs(output / ALTERNATES, whole)


def finished(task: Task) -> Row | None:
    """Give what a run left; None if it was not finished, or with other settings."""
    file = task.folder / ROW
    if not file.is_file():
        return None
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    return row if row["settings"] == settings(task.recipe()) else None


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a result depends on, but for the folders."""

    def without(section: str, *folders: str) -> dict[str, Any]:
        return {k: v for k, v in recipe.document[section].items() if k not in folders}

    found = {
        "data": {**without("data", "folder"), "forget": Path(str(recipe.data.forget)).name},
        "train": without("train", "output_dir"),
        "evaluate": without("evaluate", "reference"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def run(task: Task) -> Task:
    """Do one run and write its row, whole or not at all."""
    recipe = task.recipe()
    with redirect_stdout(sys.stderr):  # the Trainer's log lines; the table alone is for stdout
        row = measured_run(recipe)
    row |= {"group": recipe.about["group"], "settings": settings(recipe)}
    write_json(task.folder / ROW, row)
    return task


def scores_of(folders: Sequence[Path]) -> Row:
    """Summarise what stands in scores.json of each folder."""
    details = [json.loads((f / "scores.json").read_text(encoding="utf-8")) for f in folders]
    return summary(details, SCORES)


def row_of(tasks: Sequence[Task]) -> Row:
    """Summarise a method over its seeds."""
    runs = [json.loads((task.folder / ROW).read_text(encoding="utf-8")) for task in tasks]
    row: Row = {"group": runs[0]["group"], "seeds": len(runs)}
    faults = [run["non_finite"] for run in runs if run["non_finite"]]
    if faults:
        return {**row, "non_finite": faults}
    return {
        **row,
        **scores_of([task.folder / "evaluation" for task in tasks]),
        "objective": [run["objective"] for run in runs],
        "moved": all(run["moved"] for run in runs),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "passes": runs[0]["passes"],
        "vectors": runs[0]["vectors"],
        "non_finite": [],
    }


def markdown(table: Mapping[str, Row]) -> str:
    """Write the table, group by group."""
    scores = list(
        dict.fromkeys(n for row in table.values() for n in row if without_proxy(n) in SCORES)
    )
    head = ["", *map(without_judge, scores), *HEAD]
    rows = []
    for group in dict.fromkeys(row["group"] for row in table.values()):
        rows.append([f"*{group}*", *[""] * (len(head) - 1)])
        for name, row in table.items():
            if row["group"] == group:
                rows.append([name, *(cell(row.get(s), row["seeds"]) for s in scores), *costs(row)])
    text = table_of(head, rows)
    return text + "".join(f"\n\nSimilarity by {name}." for name in judges(scores))


def with_table(text: str, table: Mapping[str, Row]) -> str:
    """Replace what stands between the marks of a text."""
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise UserError(f"The file has no place for the table: {MARKS[0]} ... {MARKS[1]}.")
    return f"{before}{MARKS[0]}\n{markdown(table)}\n{MARKS[1]}{after}"


def without_proxy(name: str) -> str:
    """A score's name without what says how it was made."""
    return without_judge(name).removesuffix("_proxy")


def costs(row: Row) -> Iterator[str]:
    """The cells behind the scores."""
    if row.get("non_finite"):
        yield "not finite: stopped"
        yield from [""] * (len(HEAD) - 1)
    elif "objective" not in row:  # a model that was not unlearned
        yield from [""] * len(HEAD)
    else:
        first = row["objective"][0]
        yield arrow(first["forget"]) + ("" if row["moved"] else " (wrong way)")
        alone = first.get("retain_without")
        yield arrow(first["retain"]) + (f" ({alone:.3g} without)" if alone is not None else "")
        yield f"{row['seconds']:.2f}"
        yield ", ".join(f"{row['passes'][kind]:.3g}" for kind in ("forward", "backward", "without"))
        yield f"{row['vectors']:.1f}"


def arrow(values: Sequence[float]) -> str:
    """Before and after."""
    return " → ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()
