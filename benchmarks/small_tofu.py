"""What the benchmarks on the small TOFU model share: its target and gold, and scores in a table."""

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Details = dict[str, Any]
Row = dict[str, Any]


def unlearn(*words: str) -> None:
    """Run the command line in a process of one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "unlearn_llm", *words, "--json"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def train_if_missing(folder: Path, data: str) -> None:
    """Train the target or the gold model, whichever the folder is called."""
    if not (folder / "model.safetensors").is_file():
        given = (data, f"train.output_dir={folder}", "evaluate=null", "--overwrite")
        unlearn("finetune", f"tofu/small/{folder.name}", *given)


def evaluate_if_missing(
    model: Path, output: Path, recipe: str, overrides: Sequence[str], reference: Path | None
) -> None:
    """Evaluate target or gold as the runs of a recipe are evaluated.

    Args:
        reference: The evaluation of the gold model; None for gold itself.
    """
    if (output / "scores.json").is_file():
        return
    from unlearn_llm.pipeline import run_evaluate
    from unlearn_llm.recipe import Recipe

    loaded = Recipe.load(recipe, [*overrides, f"model.path={model}"])
    suite = loaded.suite()
    assert suite is not None
    # No refusal was taught, so OVR has no TFE in it: the papers' initial rows are made so.
    suite = suite.model_copy(update={"reference": None, "objective_kind": "untargeted"})
    run_evaluate(loaded.model, suite, loaded.data, output, reference=reference)


def summary(details: Sequence[Details], wanted: Sequence[str]) -> Row:
    """Mean and sample standard deviation over seeds, by score, as the papers scale them.

    p-values differ by orders of magnitude, so their smallest and greatest are given.

    Args:
        details: What scores.json holds, one for each seed.
        wanted: Scores by name, without `_proxy` and judges.
    """
    row: Row = {"seeds": len(details)}
    for name in details[0]["scores"]:
        short = name.split(" ")[0].removesuffix("_proxy")
        values = [one["scores"][name]["value"] for one in details]
        if short not in wanted or None in values:
            continue
        if short == "forget_quality":
            row[name] = {"min": min(values), "max": max(values)}
        else:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[name] = {"mean": 100 * statistics.fmean(values), "std": 100 * spread}
    return row


def judges(names: Sequence[str]) -> list[str]:
    """Give the judges other than the papers' that stand in brackets in names of scores."""
    return sorted({name.partition(" [")[2].rstrip("]") for name in names} - {""})


def without_judge(name: str) -> str:
    """Shorten a score's name for the head of a column."""
    return name.partition(" [")[0]


def cell(value: Mapping[str, float] | None, seeds: int) -> str:
    """Write a score of a summary."""
    if value is None:
        return "-"
    if "min" in value:
        return f"{value['min']:.0e}" + (f" to {value['max']:.0e}" if seeds > 1 else "")
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if seeds > 1 else "")


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
