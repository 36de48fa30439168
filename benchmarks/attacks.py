"""Attacks on real TOFU text: models unlearned by GA, NPO and DualOptim+, beside target and gold.

    python benchmarks/attacks.py --tofu FOLDER [--output FOLDER] [--limit 40]

FOLDER holds TOFU's files. The models are those of tofu/small, trained on a CPU. Finished runs and
finished attacks are kept: the command goes on where it was interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = {  # the same 50 forget updates of 20 rows; only what is minimised and how differs
    "ga+gd": ("me+gd/joint", "train.objective=ga+gd"),
    "npo+gd": ("me+gd/joint", "train.objective=npo+gd"),
    "me+gd DualOptim+": ("me+gd/dual_adamw_plus",),
}
OPTIONS = ("sampling.samples=4", "relearning.rows=[5, 20, 50]", "probing.rows=50")
RATE = "learning_rate=0.001"
"""Of relearning: a third of the rate that the models were trained from nothing with."""


def main() -> None:
    """Train what is missing, attack it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("outputs/tofu-small"))
    parser.add_argument("--limit", type=int, default=40, help="forget rows that are attacked")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()

    data = f"data.folder={given.tofu}"
    target, gold = given.output / "target", given.output / "gold"
    for folder in (target, gold):
        if not (folder / "model.safetensors").is_file():
            recipe = f"tofu/small/{folder.name}"
            given_to_run = (data, f"train.output_dir={folder}", "evaluate=null", "--overwrite")
            _unlearn("finetune", recipe, *given_to_run)
    models = {"initial": target}
    for title, (variant, *changes) in RUNS.items():
        folder = models[title] = given.output / f"attacked-{title.replace(' ', '-')}"
        if not (folder / "model.safetensors").is_file():
            _unlearn(
                "train",
                f"tofu/small/unlearn/{variant}",
                *changes,
                data,
                f"model.path={target}",
                f"train.output_dir={folder}",
                "evaluate=null",
                "--overwrite",
            )
    answer = _unlearn(
        "attack",
        *map(str, models.values()),
        *(data, "data.template=plain", "data.max_length=256"),
        *(*OPTIONS, f"relearning.{RATE}", f"unrelated.{RATE}"),
        *("--gold", str(gold), "--forget", "tofu/forget10", "--retain", "tofu/retain90"),
        *("--limit", str(given.limit), "--max-new-tokens", "80"),
        *("--output", str(given.output / "attacks")),
    )
    found = json.loads(answer)
    titled = {title: found[str(folder)] for title, folder in models.items()}
    print(json.dumps(titled) if given.json else _markdown(titled))


def _unlearn(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "unlearn_llm", *words, "--json"]
    print(" ".join(words[:2]), file=sys.stderr)
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout


def _markdown(found: dict[str, Any]) -> str:
    """Mean recovered of every attack and model, with the number of rows that came verbatim."""
    titles = [*found, "gold"]
    lines = [f"| attack | rows | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    by_title = {title: {c["trial"]: c for c in one["comparisons"]} for title, one in found.items()}
    first = next(iter(by_title.values()))
    for trial, one in first.items():
        sides = [by_title[title][trial]["model"] for title in found]
        cells = [_cell(side) for side in [*sides, one["gold"]]]
        lines.append(f"| {trial} | {one['model']['n']} | {' | '.join(cells)} |")
    verdicts = [one["verdict"]["level"] for one in found.values()]
    return "\n".join([*lines, f"| verdict | | {' | '.join(verdicts)} | |"])


def _cell(side: dict[str, Any]) -> str:
    leaked = "" if side["leaked"] is None else f" ({side['leaked']})"
    return f"{side['mean']:.2f}{leaked}"


if __name__ == "__main__":
    main()
