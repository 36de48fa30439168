"""The seeds' table on real TOFU text, with a small Llama trained from nothing, on a CPU.

    python benchmarks/tofu_small.py --tofu FOLDER [--output FOLDER] [--seeds 0 1 2] [--jobs 2]

FOLDER holds TOFU's files. Finished runs are kept: the command goes on where it was interrupted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    data = f"data.folder={given.tofu}"
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda folder: _model(folder, data), (target, gold)))
        # Gold before the others: forget quality compares them with its records.
        _evaluate(gold, given.tofu, gold)
        _evaluate(target, given.tofu, gold)
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


def _model(folder: Path, data: str) -> None:
    if not (folder / "model.safetensors").is_file():
        given = (data, f"train.output_dir={folder}", "evaluate=null", "--overwrite")
        _unlearn_command("finetune", f"tofu/small/{folder.name}", *given)


def _evaluate(folder: Path, tofu: Path, gold: Path) -> None:
    """Evaluate target or gold as the runs are evaluated."""
    if (folder / "evaluation" / "scores.json").is_file():
        return
    from unlearn_llm.pipeline import run_evaluate
    from unlearn_llm.recipe import Recipe

    name = f"tofu/small/unlearn/{OBJECTIVES[0]}/{SCHEMES[0]}"
    recipe = Recipe.load(name, [f"data.folder={tofu}", f"model.path={folder}"])
    suite = recipe.suite()
    assert suite is not None
    # No refusal was taught, so OVR has no TFE in it: the papers' initial rows are made so.
    changes = {"reference": None, "objective_kind": "untargeted"}
    suite = suite.model_copy(update=changes)
    reference = None if folder == gold else gold / "evaluation" / "records.jsonl"
    run_evaluate(recipe.model, suite, recipe.data, folder / "evaluation", reference=reference)


def _unlearn(
    output: Path, target: Path, gold: Path, data: str, objective: str, scheme: str, seed: int
) -> None:
    folder = _folder(output, objective, scheme, seed)
    if (folder / "evaluation" / "scores.json").is_file():
        return
    started = time.perf_counter()
    _unlearn_command(
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


def _unlearn_command(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "unlearn_llm", *words, "--json"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def _folder(output: Path, objective: str, scheme: str, seed: int) -> Path:
    return output / f"{objective}-{scheme}-{seed}"


def _summary(folders: Sequence[Path]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, by score, as the papers scale them.

    p-values differ by orders of magnitude, so their smallest and greatest are given.
    """
    details = [json.loads((f / "evaluation" / "scores.json").read_text()) for f in folders]
    row: dict[str, Any] = {"seeds": len(folders)}
    for name in details[0]["scores"]:
        short = name.split(" ")[0].removesuffix("_proxy")
        values = [one["scores"][name]["value"] for one in details]
        if short not in SCORES or None in values:
            continue
        if short == "forget_quality":
            row[name] = {"min": min(values), "max": max(values)}
        else:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[name] = {"mean": 100 * statistics.fmean(values), "std": 100 * spread}
    return row


def _markdown(table: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(n for row in table.values() for n in row if n != "seeds"))
    # The name of another judge than the papers' stands in brackets: said once, below the table.
    judges = sorted({name.partition(" [")[2].rstrip("]") for name in names} - {""})
    short = [name.partition(" [")[0] for name in names]
    lines = [f"| | {' | '.join(short)} |", "|---" * (len(names) + 1) + "|"]
    for title, row in table.items():
        cells = [_cell(row.get(name), row["seeds"]) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Similarity by {', '.join(judges)}."] if judges else lines)


def _cell(value: dict[str, float] | None, seeds: int) -> str:
    if value is None:
        return "-"
    if "min" in value:
        return f"{value['min']:.0e}" + (f" to {value['max']:.0e}" if seeds > 1 else "")
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if seeds > 1 else "")


if __name__ == "__main__":
    main()
