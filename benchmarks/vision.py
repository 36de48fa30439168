"""The slides' table of an image classifier: unlearning methods with and without DualOptim.

    python benchmarks/vision.py [--seeds 0 1 2 3 4] [--output FOLDER] [--forget class] [--json]
    python benchmarks/vision.py --search [--search-seeds 100]

A seed draws the forget set (a tenth of the training images), trains an original model on
everything and a retrained one without it, and runs every method with every optimiser on the
original. What is learned and why it is hard enough: `vision_task.py`; methods and optimisers:
`vision_methods.py`; the numbers: `vision_metrics.py`.

The rate of forget steps is all that is tuned, with eight runs for every method and optimiser:
`--search` takes the rate with the smallest Gap on a seed that is not in the table, from a grid and
then once more beside the best, and writes it to `vision_rates.json`. Finished rows are kept in
FOLDER, and a command goes on where it was interrupted.
"""

import argparse
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from vision_methods import METHODS, OptimizerName, choose_mask, optimizers_of, unlearn
from vision_metrics import Summary, markdown, measure, summarize
from vision_task import Forget, Task, make_task, pretrain

from unlearn_llm.evaluation.records import write_json, write_json_lines

RATES = Path(__file__).with_name("vision_rates.json")
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RETRAIN = "retrain"
TITLES = {"shared": "", "dual": " + DualOptim", "dual_plus": " + DualOptim+"}


class Run(NamedTuple):
    """What makes a row, and all that it depends on."""

    forget: Forget
    method: str
    optimizer: OptimizerName | None
    rate: float | None
    seed: int


def main() -> None:
    """Do what is missing, print the table or write the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("outputs/vision"))
    parser.add_argument("--forget", choices=get_args(Forget), default="random")
    parser.add_argument("--search", action="store_true", help="tune the rates instead")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    torch.set_num_threads(1)  # small batches gain nothing from two, and sums keep their order

    if given.search:
        found = search(given.forget, given.search_seeds, given.output / "search.jsonl")
        write_json(RATES, {**read_rates(), given.forget: found})
        print(json.dumps(found, indent=2))
        return
    rates = read_rates().get(given.forget)
    if rates is None:
        parser.error(f"{RATES.name} has no rates for --forget {given.forget}; --search them first.")
    table = tabulate(given.forget, rates, given.seeds, given.output / "rows.jsonl")
    if given.json:
        print(json.dumps({title: line._asdict() for title, line in table.items()}))
    else:
        print(markdown(table))


def read_rates() -> dict[str, Any]:
    """Give the rate of every method and optimiser, by what is forgotten."""
    return json.loads(RATES.read_text(encoding="utf-8")) if RATES.is_file() else {}


def tabulate(
    forget: Forget, rates: dict[str, dict[str, float]], seeds: list[int], file: Path
) -> dict[str, Summary]:
    """Make the table, one line for retraining and each method and optimiser."""
    variants = {"Retrain": (RETRAIN, None, None)} | {
        name + TITLES[optimizer]: (name, optimizer, rates[name][optimizer])
        for name, method in METHODS.items()
        for optimizer in optimizers_of(method)
    }
    runs = {
        title: [Run(forget, *variant, seed) for seed in seeds]
        for title, variant in variants.items()
    }
    rows = complete(file, (run for seed in zip(*runs.values(), strict=True) for run in seed))
    gold = [rows[run] for run in runs["Retrain"]]
    return {title: summarize([rows[run] for run in some], gold) for title, some in runs.items()}


def search(forget: Forget, seeds: list[int], file: Path) -> dict[str, dict[str, float]]:
    """Find the rate with the smallest Gap: on the grid, then beside the best."""
    pairs = [(name, o) for name, method in METHODS.items() for o in optimizers_of(method)]
    best = nearest(forget, seeds, file, {pair: GRID for pair in pairs})
    closer = {
        pair: (rate, _rounded(rate / 1.8), _rounded(rate * 1.8)) for pair, rate in best.items()
    }
    found: dict[str, dict[str, float]] = {}
    for (name, optimizer), rate in nearest(forget, seeds, file, closer).items():
        found.setdefault(name, {})[optimizer] = rate
    return found


def nearest(
    forget: Forget,
    seeds: list[int],
    file: Path,
    rates: dict[tuple[str, OptimizerName], tuple[float, ...]],
) -> dict[tuple[str, OptimizerName], float]:
    """Give the rate with the smallest Gap to retraining, for each method and optimiser."""
    gold = [Run(forget, RETRAIN, None, None, seed) for seed in seeds]
    tried = {
        (pair, rate): [Run(forget, *pair, rate, seed) for seed in seeds]
        for pair, some in rates.items()
        for rate in some
    }
    rows = complete(file, (run for seed in zip(gold, *tried.values(), strict=True) for run in seed))
    retrained = [rows[run] for run in gold]
    gaps = {key: summarize([rows[r] for r in runs], retrained).gap for key, runs in tried.items()}
    return {pair: min(some, key=lambda rate: gaps[pair, rate]) for pair, some in rates.items()}


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def complete(file: Path, runs: Iterable[Run]) -> dict[Run, dict[str, float]]:
    """Do the runs that the file has not, writing it after each; give the rows of all."""
    rows = read_rows(file)
    for run in tqdm(list(runs), desc=file.stem):
        if run not in rows:
            rows[run] = do(run)
            write_json_lines(file, [{**r._asdict(), "metrics": m} for r, m in rows.items()])
    return rows


def read_rows(file: Path) -> dict[Run, dict[str, float]]:
    """Give what was done before."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {Run(**{name: row[name] for name in Run._fields}): row["metrics"] for row in rows}


def do(run: Run) -> dict[str, float]:
    """Make the model of a run and measure it; the same run gives the same numbers, bit by bit."""
    task, original = start(run.seed, run.forget)
    if run.optimizer is None or run.rate is None:
        return measure(pretrain(task.retain, seed=2 * run.seed + 1), task)
    method, mask = METHODS[run.method], mask_of(run.method, run.seed, run.forget)
    model = unlearn(original, task, method, run.optimizer, run.rate, mask=mask, seed=run.seed)
    return measure(model, task)


@lru_cache(maxsize=1)
def start(seed: int, forget: Forget) -> tuple[Task, nn.Module]:
    """Give what a seed's methods start from: its data, and the model that saw all of it."""
    task = make_task(seed, forget)
    return task, pretrain(task.train, seed=2 * seed)


@lru_cache(maxsize=len(METHODS))
def mask_of(method: str, seed: int, forget: Forget) -> list[Tensor]:
    """Choose a mask once for all optimisers and rates: it depends on the original alone."""
    task, original = start(seed, forget)
    return choose_mask(METHODS[method], original, task)


if __name__ == "__main__":
    main()
