"""Do 8-bit states end where 32-bit states end? Small TOFU runs over seeds, bounded and not.

    python benchmarks/eight_bit.py --tofu FOLDER --target FOLDER [--seeds 0 1 2] [--jobs 2]

The target is the model of `unlearn finetune tofu/small/target`. Every run is 300 steps of
tofu/small/unlearn/me+gd/dual_adamw_plus. Compared are the negative log-likelihood of the forget set
along the run (root of the mean squared difference over checkpoints, nats per token) and the final
weights (distance relative to how far training moved them). The yardstick is how far two 32-bit
runs are apart that differ in the order of the data only.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn_llm import Encoder, load_rows
from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.rows import to_pairs
from unlearn_llm.scoring import score

EVERY = 30
STEPS = 300


def settings(bound: float) -> dict[str, dict[str, object]]:
    """Name the variants: what is given to the optimiser."""
    bounded = {"max_update": bound}
    return {
        "32 faithful": {"max_update": None},
        "32 bounded": bounded,
        "8 nearest bounded": {**bounded, "state_bits": 8},
        "8 stochastic bounded": {**bounded, "state_bits": 8, "rounding": "stochastic"},
    }


def main() -> None:
    """Run what is missing, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--target", type=Path, required=True, help="the model to unlearn from")
    parser.add_argument("--output", type=Path, default=Path("outputs/eight-bit"))
    parser.add_argument("--objective", default="me+gd")
    parser.add_argument("--bound", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    variants = settings(given.bound)
    with ThreadPoolExecutor(given.jobs) as pool:
        work = list(itertools.product(given.seeds, variants))
        list(pool.map(lambda one: train(given, one[1], variants[one[1]], one[0]), work))
        paths = list(pool.map(lambda one: losses(given, one[1], one[0]), work))
    trajectories = dict(zip(work, paths, strict=True))
    start = load_file(given.target / "model.safetensors")
    table = {name: compare(given, trajectories, start, name) for name in variants}
    if given.json:
        print(json.dumps(table))
        return
    print("| | forget NLL at the end | NLL along the run, to 32 bit | weights, to 32 bit |")
    print("|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['end']} | {row['trajectory']} | {row['weights']} |")


def folder_of(given: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a run lies."""
    return given.output / f"{name.replace(' ', '-')}-{given.bound:g}-{given.objective}-{seed}"


def train(given: argparse.Namespace, name: str, options: dict[str, object], seed: int) -> None:
    """Do one run, unless it is there."""
    folder = folder_of(given, name, seed)
    if (folder / "model.safetensors").is_file():
        return
    overrides = [
        f"train.optimizer_parameters.{key}={json.dumps(value)}" for key, value in options.items()
    ]
    command = [
        *(sys.executable, "-m", "unlearn_llm", "train"),
        f"tofu/small/unlearn/{given.objective}/dual_adamw_plus",
        *(f"data.folder={given.tofu}", f"model.path={given.target}"),
        *(f"train.output_dir={folder}", f"train.seed={seed}", "evaluate=null"),
        *("train.save_strategy=steps", f"train.save_steps={EVERY}", "train.save_only_model=true"),
        *overrides,
        "--overwrite",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


@torch.inference_mode()
def losses(given: argparse.Namespace, name: str, seed: int) -> list[float]:
    """Score the forget set at every checkpoint: nats per token."""
    folder = folder_of(given, name, seed)
    cache = folder / "forget_nll.json"
    if cache.is_file():
        return json.loads(cache.read_text())
    tokenizer = AutoTokenizer.from_pretrained(given.target)
    pairs = to_pairs(load_rows("tofu/forget10", folder=given.tofu), "forget10")
    encoder = Encoder(tokenizer, "plain", max_length=256)
    rows = EncodedRows(pairs, encoder, ("original",), refusals=["-"], seed=0)
    order = sorted(range(len(rows)), key=lambda row: rows.lengths[row])
    collate = Collator(int(tokenizer.eos_token_id)).sequences
    batches = [
        collate([rows[row]["original"] for row in order[start : start + 50]])
        for start in range(0, len(order), 50)
    ]
    found = []
    for step in range(EVERY, STEPS + 1, EVERY):
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}").eval()
        scored = [score(model, {"original": batch})["original"] for batch in batches]
        total = -sum(float(one.logp.sum()) for one in scored)
        found.append(total / sum(int(one.length.sum()) for one in scored))
    cache.write_text(json.dumps(found))
    return found


def compare(
    given: argparse.Namespace,
    trajectories: dict[tuple[int, str], list[float]],
    start: dict[str, torch.Tensor],
    name: str,
) -> dict[str, str]:
    """Compare a variant with the 32-bit runs of the same seeds; those with each other's seeds."""
    base = "32 faithful" if "faithful" in name else "32 bounded"
    if name == base:
        pairs = [((a, name), (b, name)) for a, b in itertools.combinations(given.seeds, 2)]
    else:
        pairs = [((seed, name), (seed, base)) for seed in given.seeds]
    runs = {
        key: load_file(folder_of(given, key[1], key[0]) / "model.safetensors")
        for key in {key for pair in pairs for key in pair}
    }
    along = [rms(trajectories[a], trajectories[b]) for a, b in pairs]
    weights = [distance(runs[a], runs[b]) / distance(start, runs[b]) for a, b in pairs]
    ends = [trajectories[seed, name][-1] for seed in given.seeds]
    label = " between seeds" if name == base else ""
    return {
        "end": shown(ends),
        "trajectory": shown(along) + label,
        "weights": shown(weights) + label,
    }


def shown(values: list[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def rms(left: list[float], right: list[float]) -> float:
    """Root of the mean squared difference."""
    return math.sqrt(statistics.mean((a - b) ** 2 for a, b in zip(left, right, strict=True)))


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    squares = (float((left[name] - right[name]).double().square().sum()) for name in left)
    return math.sqrt(sum(squares))


if __name__ == "__main__":
    main()
