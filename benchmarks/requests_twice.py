"""Does a second request bring back what the first one forgot? With the ledger's filter and without.

    python benchmarks/requests_twice.py [--output FOLDER] [--seeds 0 1 2]

Generated authors, the model of synthetic/target. The first request forgets five per cent of them,
the second five more; its retain set is everything else, the first ones among it, as whoever keeps
one file of training data would give it. Finished runs are kept.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from unlearn_llm.evaluation.records import write_json_lines
from unlearn_llm.pipeline import run_finetune, run_train
from unlearn_llm.recipe import Recipe
from unlearn_llm.rows import load_rows

SCORES = ("forget/rouge", "forget/probability", "MU9")
STAGES = {
    "target": "before",
    "first": "after the first request",
    "continued": "after the second, `--continue-from`",
    "unfiltered": "after the second, without it",
}


def main() -> None:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/requests"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    write_sets(given.output)
    with redirect_stdout(sys.stderr):  # where the Trainer prints its logs
        for seed in given.seeds:
            run_all(given.output, seed)
    print(table(given.output, given.seeds))


def write_sets(folder: Path) -> None:
    """Write both forget sets, and for each what is not in it."""
    everything = load_rows("synthetic/full")
    first = load_rows("synthetic/forget05")
    second = [row for row in load_rows("synthetic/forget10") if row not in first]
    for name, rows in (("first", first), ("second", second)):
        write_json_lines(folder / f"{name}.jsonl", rows)
        others = [row for row in everything if row not in rows]
        write_json_lines(folder / f"all_but_{name}.jsonl", others)


def run_all(folder: Path, seed: int) -> None:
    """Learn; forget the first set; forget the second one, in both ways."""
    of_seed = folder / f"seed-{seed}"
    common = [f"train.seed={seed}", "evaluate.overrides={split: forget05}"]
    target = Recipe.load("synthetic/target", [*common, f"train.output_dir={of_seed / 'target'}"])
    run_finetune(target, resume=(of_seed / "target").exists())
    for name, asked, after in (
        ("first", "first", ["model.path={}/target"]),
        ("continued", "second", ["model.path={}/first", "model.continued=true"]),
        ("unfiltered", "second", ["model.path={}/first"]),
    ):
        made = of_seed / name
        settings = [
            *common,
            f"data.forget={folder / asked}.jsonl",
            f"data.retain={folder / 'all_but_'}{asked}.jsonl",
            f"train.output_dir={made}",
            "evaluate.reference=null",
            *(text.format(of_seed) for text in after),
        ]
        run_train(Recipe.load("synthetic/unlearn", settings), resume=made.exists())


def table(folder: Path, seeds: Sequence[int]) -> str:
    """Make a Markdown table: scores of the rows of the first request, mean (range) over seeds."""
    lines = [("the first request's rows", *SCORES), ("---",) * (1 + len(SCORES))]
    for stage, words in STAGES.items():
        scores = [_scores(folder / f"seed-{seed}" / stage) for seed in seeds]
        lines.append((words, *(_cell([one[name] for one in scores]) for name in SCORES)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(run: Path) -> dict[str, float]:
    details: dict[str, Any] = json.loads((run / "evaluation" / "scores.json").read_text())
    return {name: details["scores"][name]["value"] for name in SCORES}


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
