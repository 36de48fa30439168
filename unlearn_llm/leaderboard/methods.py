"""Which runs are one method: all but the seed and the task must be the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearn_llm.leaderboard.runs import FinishedRun, flattened, scheme
from unlearn_llm.safe_text import printable

NO_METHOD = {
    "train": {"seed", "output_dir", "objective", "schedule", "combine", "optimizer"},
    "data": {"folder", "task_id", "forget"},
    "model": {"path", "tokenizer"},
}
"""What does not make another method: replicates, places, and what the label says already."""
NO_METHOD_PREFIXES = ("logging_", "save_", "eval_", "report_to", "use_cpu", "disable_tqdm", "run_")

Method = tuple[str, str]
"""Objective and label."""


def labels(runs: Sequence[FinishedRun]) -> dict[Method, list[FinishedRun]]:
    """Sort runs into methods, in the order in which they appear.

    Runs with one objective, schedule, optimiser and combination that differ in another setting
    are told apart by it: "dual_adamw_plus (optimizer_parameters.max_update=1.0)".
    """
    alike: dict[Method, list[FinishedRun]] = {}
    for run in runs:
        alike.setdefault((run.train["objective"], scheme(run.train)), []).append(run)
    found: dict[Method, list[FinishedRun]] = {}
    for (objective, name), members in alike.items():
        settings = [_settings(run) for run in members]
        telling = _telling(members, settings)
        for run, of_run in zip(members, settings, strict=True):
            said = ", ".join(f"{key}={of_run.get(key)}" for key in telling)
            label = f"{name} ({said})" if said else name
            found.setdefault((printable(objective), printable(label)), []).append(run)
    return found


def _telling(runs: Sequence[FinishedRun], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the settings in which runs of the same split differ."""
    telling: dict[str, None] = {}
    for split in dict.fromkeys(run.suite["split"] for run in runs):
        of_split = [s for run, s in zip(runs, settings, strict=True) if run.suite["split"] == split]
        keys = dict.fromkeys(key for found in of_split for key in found)
        for key in keys:
            if any(found.get(key) != of_split[0].get(key) for found in of_split):
                telling[key] = None
    return list(telling)


def _settings(run: FinishedRun) -> dict[str, Any]:
    found = {}
    for section, left_out in NO_METHOD.items():
        values = run.recipe.get(section) or {}
        # The files that a task is kept from differ with the task.
        without = left_out | ({"retain"} if run.data.get("task_id") is not None else set())
        for key, value in flattened({k: v for k, v in values.items() if k not in without}):
            if not key.startswith(NO_METHOD_PREFIXES):
                found[key if section == "train" else f"{section}.{key}"] = value
    return found
