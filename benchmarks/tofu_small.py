"""The seeds' table on real TOFU text, with a small Llama trained from nothing, on a CPU.

    python benchmarks/tofu_small.py --tofu FOLDER [--output FOLDER] [--seeds 0 1 2] [--jobs 2]

FOLDER holds TOFU's files. Finished runs are kept: the command goes on where it was interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from small_tofu import (
    Row,
    cell,
    evaluate_if_missing,
    judges,
    summary,
    table_of,
    train_if_missing,
    unlearn,
    without_judge,
)

OBJECTIVES = ("idk+gd", "me+gd")
SCHEMES = ("joint", "alternate", "dual_adamw", "dual_adamw_plus", "dual_adamw_plus_released")
SCORES = ("UFE", "TFE", "MU18", "OVR", "forget_quality")


def main() -> None:
    """Train what is missing, evaluate it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("outputs/tofu-small"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()

    target, gold = given.output / "target", given.output / "gold"
    data, gold_scores = f"data.folder={given.tofu}", gold / "evaluation"
    recipe = f"tofu/small/unlearn/{OBJECTIVES[0]}/{SCHEMES[0]}"
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda folder: train_if_missing(folder, data), (target, gold)))
        # Gold before the others: forget quality compares them with its records.
        evaluate_if_missing(gold, gold_scores, recipe, [data], None)
        evaluate_if_missing(target, target / "evaluation", recipe, [data], gold_scores)
        runs = [(o, s, n) for n in given.seeds for o in OBJECTIVES for s in SCHEMES]
        list(pool.map(lambda run: _unlearn(given.output, target, gold, data, *run), runs))

    table = {"initial": _summary([target]), "gold": _summary([gold])}
    for objective in OBJECTIVES:
        for scheme in SCHEMES:
            folders = [_folder(given.output, objective, scheme, seed) for seed in given.seeds]
            table[f"{objective} {scheme}"] = _summary(folders)
    if given.json:
        print(json.dumps(table))
    else:
        print(_markdown(table))


def _unlearn(
    output: Path, target: Path, gold: Path, data: str, objective: str, scheme: str, seed: int
) -> None:
    folder = _folder(output, objective, scheme, seed)
    if (folder / "evaluation" / "scores.json").is_file():
        return
    started = time.perf_counter()
    unlearn(
        "train",
        f"tofu/small/unlearn/{objective}/{scheme}",
        data,
        f"model.path={target}",
        f"train.output_dir={folder}",
        f"train.seed={seed}",
        f"evaluate.reference={gold / 'evaluation' / 'records.jsonl'}",
        "--overwrite",
    )
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _folder(output: Path, objective: str, scheme: str, seed: int) -> Path:
    return output / f"{objective}-{scheme}-{seed}"


def _summary(folders: Sequence[Path]) -> Row:
    details = [json.loads((f / "evaluation" / "scores.json").read_text()) for f in folders]
    return summary(details, SCORES)


def _markdown(table: dict[str, Row]) -> str:
    names = list(dict.fromkeys(n for row in table.values() for n in row if n != "seeds"))
    rows = [
        [title, *(cell(row.get(name), row["seeds"]) for name in names)]
        for title, row in table.items()
    ]
    text = table_of(["", *map(without_judge, names)], rows)
    # The name of another judge than the papers' stands in brackets: said once, below the table.
    return text + "".join(f"\n\nSimilarity by {name}." for name in judges(names))


if __name__ == "__main__":
    main()
