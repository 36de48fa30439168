"""lm-eval's tasks as probes of a suite, asked of the model in memory.

The harness is needed only where a suite names one of its tasks (extra `lm-eval`). What it finds
row by row becomes records and columns like those of our own probes, and it writes nothing itself.
"""

import copy
import importlib.util
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.batching import evaluating
from unlearn_llm.evaluation.lm_eval_data import data_from
from unlearn_llm.evaluation.records import Record
from unlearn_llm.evaluation.scores import Score
from unlearn_llm.evaluation.suite import Probe, ScoreOf, Suite
from unlearn_llm.registry import did_you_mean
from unlearn_llm.scoring import unwrapped

FEWSHOT_SEED = 1234
"""lm-eval's own: which examples stand before a question."""
CPU_BATCH = 8
MOST_NEW_TOKENS = 256
"""lm-eval's own, for tasks that name no limit."""
BOOTSTRAP = 100
"""Resamples of lm-eval's own standard errors, where it has no formula."""


class Tasks(NamedTuple):
    """The tasks of one probe, with their data."""

    probe: Probe
    loaded: dict[str, Any]
    """What TaskManager.load gives: one task, or a group with all its own."""


class TaskResult(NamedTuple):
    """What came out of one probe."""

    records: list[Record]
    about: dict[str, Any]
    """Task, version, shots, rows, and every value with lm-eval's standard error."""
    reasons: dict[str, str]
    """Why metrics have no column."""


def require_lm_eval(suite: Suite) -> None:
    """Refuse a suite with tasks where lm-eval is not installed.

    Raises:
        UserError: naming the extra.
    """
    tasks = [probe.task for probe in suite.probes.values() if probe.task]
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"The tasks {', '.join(tasks)} are lm-eval's, which is not installed: "
            "pip install 'unlearn_llm[lm-eval]'."
        )


def load_tasks(suite: Suite, model: Any) -> dict[str, Tasks]:
    """Load the tasks of a suite and their data.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its data cannot be had, or the
            model is none that it can ask.
    """
    probes = {name: probe for name, probe in suite.probes.items() if probe.task}
    if not probes:
        return {}
    require_lm_eval(suite)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"The tasks {', '.join(str(probe.task) for probe in probes.values())} are put to a "
            f"model of transformers, not to a {type(model).__name__}. lm-eval's own command can "
            "ask others."
        )
    with _quiet(), _same_random_numbers():
        manager = _manager([str(probe.task) for probe in probes.values()], suite.task_folders)
        with data_from(suite.folder):
            return {name: Tasks(probe, _load(manager, probe)) for name, probe in probes.items()}


def run_tasks(
    tasks: Mapping[str, Tasks], suite: Suite, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, TaskResult]:
    """Ask a model, probe by probe.

    Differs from `lm_eval` on the command line: the model's mode and the state of the random
    numbers are as before afterwards; a model of a short context generates at most half of it.
    """
    if not tasks:
        return {}
    from lm_eval.evaluator import evaluate

    if isinstance(model, DistributedDataParallel):
        model = model.module  # only the first process asks

    found = {}
    with _quiet(), _same_random_numbers(), evaluating(model):
        lm = _in_memory(model, tokenizer)
        for name, (probe, loaded) in tasks.items():
            limit = suite.limit if probe.limit is None else probe.limit
            raw = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=None if limit == "all" else limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
            )
            found[name] = _result(name, str(probe.task), raw, lm)
    return found


def with_scores(suite: Suite, results: Mapping[str, TaskResult]) -> Suite:
    """Add a score for every metric of the tasks of which the suite names none."""
    probes, scores = dict(suite.probes), dict(suite.scores)
    for name, result in results.items():
        if probes[name].metrics:
            continue
        metrics = list(result.records[0]["metrics"]) if result.records else []
        probes[name] = probes[name].model_copy(update={"metrics": metrics})
        for metric in metrics:
            options = {"probe": name, "metric": metric}
            scores[f"{name} {metric}"] = ScoreOf(aggregate="mean", options=options)
    return suite.model_copy(update={"probes": probes, "scores": scores})


def facts(score: ScoreOf, results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Say of a score what the literature states with it: metric key, shots, standard error."""
    result = results.get(str(score.options.get("probe")))
    metric = score.options.get("metric")
    if result is None or metric not in result.about["metrics"]:
        return {}
    stderr = result.about["metrics"][metric]["stderr"]
    return {"metric": metric, "shots": result.about["shots"], "stderr": stderr}


def notes_of(score: ScoreOf, results: Mapping[str, TaskResult]) -> list[str]:
    """Say in words what a reader of a score must know."""
    about = facts(score, results)
    if not about:
        return []
    shots, stderr = about["shots"], about["stderr"]
    words = f"{about['metric']}, {'mixed' if shots is None else shots} shots"
    sure = [] if stderr is None else [f"stderr {stderr:.4f}"]
    return [words, *sure, *results[score.options["probe"]].about["notes"]]


def with_notes(
    suite: Suite, scores: Mapping[str, Score], results: Mapping[str, TaskResult]
) -> dict[str, Score]:
    """Put what a reader must know of the tasks' scores before their own notes."""
    noted = {}
    for (name, score), of_suite in zip(scores.items(), suite.scores.values(), strict=True):
        words = [*notes_of(of_suite, results), *filter(None, [score.note])]
        noted[name] = replace(score, note="; ".join(words) or None)
    return noted


def _manager(tasks: Sequence[str], folders: Sequence[str]) -> Any:
    """Make a task manager that knows the tasks, if there are such tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"There is no folder {folder} with tasks of lm-eval (task_folders).")
    own = [Path(folder).expanduser() for folder in folders]
    packaged = Path(lm_eval.__file__).parent / "tasks"
    # Reading all of lm-eval's thousands of files takes seconds to minutes, its usual places not.
    near = [packaged / part for task in tasks for part in (task, task.split("_")[0])]
    places = [*dict.fromkeys(place for place in near if place.is_dir()), *own]
    manager = TaskManager(include_defaults=False, include_path=places)
    if set(tasks) - set(manager.all_tasks):
        manager = TaskManager(include_path=own or None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(
                f"lm-eval knows no task {task!r}.{did_you_mean(task, manager.all_tasks)} Its tasks "
                "are listed by `lm-eval ls tasks`; a folder of your own is named by task_folders."
            )
    return manager


def _load(manager: Any, probe: Probe) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([probe.task])
    except UserError as error:
        raise UserError(f"Task {probe.task!r}: {error}") from error
    except KeyError as error:
        raise UserError(
            f"The data of the task {probe.task!r} have no split {error}, which it needs."
        ) from error
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The data of the task {probe.task!r} could not be loaded: {reason.rstrip('.')}. Give "
            "a folder that has them (folder=...), or leave the task out (tasks=[...])."
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # As in lm-eval: a task that says 0 has its examples in the prompt.
        wanted = probe.shots if probe.shots is not None and own != 0 else own
        task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _in_memory(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Any:
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """HFLM, but a model of a short context leaves half of it to the question."""

        @property
        def max_gen_toks(self) -> int:
            return min(MOST_NEW_TOKENS, int(self.max_length) // 2)

    on_cpu = unwrapped(model).device.type == "cpu"
    return InMemory(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets its pad token
        batch_size=CPU_BATCH if on_cpu else "auto",
        # DualOptim(+)'s runs have it; it adds nothing where the tokenizer has no such token.
        add_bos_token=True,
    )


def _result(probe: str, task: str, raw: Mapping[str, Any], lm: Any) -> TaskResult:
    samples: Mapping[str, list[dict[str, Any]]] = raw["samples"]
    records = _records(probe, task, samples)
    stated = {**raw["results"].get(task, {}), **raw.get("groups", {}).get(task, {})}
    metrics = {
        key: {"value": _number(value), "stderr": _number(stated.get(_stderr(key)))}
        for key, value in stated.items()
        if "," in key and "_stderr," not in key
    }
    reasons = _drop_others(records, metrics)
    shots = {raw["n-shot"][name] for name in samples}
    cut = _cut(records, lm)
    about = {
        "task": task,
        "version": raw["versions"].get(task),
        "shots": shots.pop() if len(shots) == 1 else None,
        "rows": len(records),
        "metrics": metrics,
        "notes": [f"{cut} of {len(records)} prompts cut at the model's context"] if cut else [],
    }
    return TaskResult(records, about, reasons)


def _records(
    probe: str, task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Record]:
    """Make a record of every row; a group's rows are numbered within their task."""
    rows: dict[str, Record] = {}
    keys: dict[str, None] = {}
    for name, of_task in samples.items():
        for sample in of_task:
            number = str(sample["doc_id"]) if name == task else f"{name}/{sample['doc_id']}"
            record = rows.setdefault(number, _record(probe, number, sample))
            for metric in sample["metrics"]:
                key = f"{metric},{sample['filter']}"
                keys[key] = None
                record["metrics"][key] = _number(sample[metric])
    for record in rows.values():
        record["metrics"] = {key: record["metrics"].get(key) for key in keys}
    return list(rows.values())


def _record(probe: str, number: str, sample: Mapping[str, Any]) -> Record:
    said = sample["resps"][0][0]
    return {
        "probe": probe,
        "id": number,
        "question": str(sample["arguments"][0][0]),
        "answer": str(sample["target"]),
        "reference": None,
        "generation": {"text": said} if isinstance(said, str) else None,
        "results": {},
        "metrics": {},
    }


def _drop_others(records: Sequence[Record], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Leave out metrics that are no mean over rows: their columns would say something else."""
    reasons = {}
    for key in list(records[0]["metrics"]) if records else []:
        values = [record["metrics"][key] for record in records]
        known = [value for value in values if value is not None]
        stated = metrics.get(key, {}).get("value")
        mean = math.fsum(known) / len(known) if known else None
        if mean is None or (stated is not None and not math.isclose(mean, stated, abs_tol=1e-9)):
            reasons[key] = f"{key} is no mean over rows; lm-eval's value stands under `tasks`"
            for record in records:
                del record["metrics"][key]
    return reasons


def _cut(records: Sequence[Record], lm: Any) -> int:
    """Count the prompts of which the model cannot read the beginning."""
    generates = any(record["generation"] for record in records)
    room = lm.max_length - (lm.max_gen_toks if generates else 1)
    return sum(len(lm.tok_encode(record["question"])) > room for record in records)


def _stderr(key: str) -> str:
    metric, _, rest = key.partition(",")
    return f"{metric}_stderr,{rest}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return None  # lm-eval writes "N/A", and tuples for metrics over the whole set


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Set the random numbers back afterwards: training may go on."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's warnings about models in memory out of the log; errors are still told."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
