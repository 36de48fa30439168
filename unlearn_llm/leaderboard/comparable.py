"""May these runs stand in one table? If not: which setting differs, and how to choose."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.report import P_VALUES
from unlearn_llm.leaderboard.runs import FinishedRun

FREE_IN_SUITE = {"split", "folder", "reference", "objective_kind", "intervals"}
"""What may differ in a table: splits are columns, the next two are paths, kinds are blocks, and
intervals leave the scores as they are."""
NO_MEASURE = {"group"}
"""Columns of a probe that say whose a row is, and change no score."""
OF_MODEL = ("type", "dtype", "template", "max_length")
AGAINST_REFERENCE = {"forget_quality", "ks_statistic", "privleak", "mia_reference_auc"}
"""Aggregates that compare with a gold model's records."""
SHOWN_RUNS = 2
SHOWN_CHARACTERS = 80


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs of one suite and model that were not measured alike.

    Raises:
        UserError: one line with the first setting that differs, its values and the runs.
    """
    settings = [_measured_how(run) for run in runs]
    for key in dict.fromkeys(key for found in settings for key in found):
        pairs = zip(runs, settings, strict=True)
        _agree(key, [(run, found[key]) for run, found in pairs if key in found])
    _agree("model.path", [(run, _place(run)) for run in runs if _place(run)])
    full = [run for run in runs if not _is_adapter(run)]
    _agree("model.parameters", [(run, run.details["model"].get("parameters")) for run in full])
    for objective in dict.fromkeys(run.train["objective"] for run in runs if run.unlearned):
        alike = [run for run in runs if run.unlearned and run.train["objective"] == objective]
        _agree("suite.objective_kind", [(run, run.suite.get("objective_kind")) for run in alike])


def _is_adapter(run: FinishedRun) -> bool:
    lora = (run.recipe.get("model") or {}).get("lora")
    return bool(lora) or "adapter" in run.details["model"]


def check_replicates(runs: Sequence[FinishedRun], label: str) -> None:
    """Refuse two runs with the same seed and task: a mean over copies is no mean over seeds."""
    seen: dict[Any, FinishedRun] = {}
    for run in runs:
        other = seen.setdefault(run.replicate, run)
        if other is not run:
            seed, task = run.replicate
            of_task = f", task {task}" if task is not None else ""
            raise UserError(
                f"{other.folder} and {run.folder} are both {label} with seed {seed}{of_task}. "
                "Leave one of them out."
            )


def check_p_values(runs: Sequence[FinishedRun], names: Iterable[str]) -> None:
    """Refuse p-values of tests on unlike numbers of rows, or against unlike gold models.

    Args:
        runs: Of one split.
        names: The scores of the table.
    """
    for name in names:
        measured = [run for run in runs if _value(run, name) is not None]
        aggregates = {run.scores[name].get("aggregate") for run in measured}
        if aggregates & P_VALUES:
            _agree(f"{name}: rows", [(run, run.scores[name].get("n")) for run in measured])
        if aggregates & AGAINST_REFERENCE:
            _agree(
                "reference", [(run, _contents(run.details.get("reference"))) for run in measured]
            )


def _measured_how(run: FinishedRun) -> dict[str, Any]:
    """Give what was asked of a model, and how.

    What one of two suites does not have, they do not disagree on: it may have gained a score.
    """
    suite = run.suite
    found = {
        f"suite.{key}": value
        for key, value in suite.items()
        if key not in FREE_IN_SUITE | {"probes", "scores"}
    }
    for name, probe in suite.get("probes", {}).items():
        columns = probe.get("columns") or {}
        read = {k: v for k, v in columns.items() if v is not None and k not in NO_MEASURE}
        found |= {
            f"suite.probes.{name}.source": probe.get("source"),
            f"suite.probes.{name}.limit": probe.get("limit"),
            f"suite.probes.{name}.columns": read,
        }
    found |= {f"suite.scores.{name}": score for name, score in suite.get("scores", {}).items()}
    return found | {f"model.{key}": run.details["model"].get(key) for key in OF_MODEL}


def _agree(key: str, found: Sequence[tuple[FinishedRun, Any]]) -> None:
    by_value: dict[str, list[FinishedRun]] = {}
    for run, value in found:
        by_value.setdefault(json.dumps(value, sort_keys=True, ensure_ascii=False), []).append(run)
    if len(by_value) < 2:
        return
    said = "; ".join(f"{_cut(value)} in {_named(runs)}" for value, runs in by_value.items())
    first = next(iter(by_value))
    by_key = len(first) <= SHOWN_CHARACTERS and found[0][0].setting(key) == found[0][1]
    choice = f"--only '{key}={first}'" if by_key else "the folders you give"
    raise UserError(
        f"These runs cannot stand in one table, {key} differs: {said}. Choose with {choice}."
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _named(runs: Sequence[FinishedRun]) -> str:
    names = [str(run.folder) for run in runs[:SHOWN_RUNS]]
    more = len(runs) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _place(run: FinishedRun) -> str | None:
    """Where the model to unlearn lies, if it is a folder that is still there."""
    path = Path(run.model_path).expanduser()
    there = bool(run.unlearned and run.model_path and path.is_dir())
    return str(path.resolve()) if there else None


def _value(run: FinishedRun, name: str) -> float | None:
    value: float | None = run.scores.get(name, {}).get("value")
    return value


def _contents(path: str | None) -> str | None:
    """Identify records by what is in them, where they are still there; else by their path."""
    if path is None or not Path(path).is_file():
        return path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
