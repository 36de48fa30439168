"""Finished runs on disk: a recipe, and the scores of the model that came out of it.

Recipes are read as plain YAML: a run is judged by what it says, without importing what made it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import RECORDS, SCORES
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.recipe_files import read_document
from unlearn_llm.safe_text import printable
from unlearn_llm.yaml_text import parse_yaml

EVALUATION = "evaluation"
RECIPE = "recipe.yaml"
DEFAULTS: Mapping[str, Any] = {
    "objective": "idk+ap",
    "schedule": "alternate",
    "combine": None,
    "optimizer": None,
    "seed": 42,
}
"""What a recipe means that leaves these settings out; tests hold them against UnlearnConfig."""
EXPECTED_SCHEDULE = {"optimizer": "alternate", "combine": "joint"}


@dataclass(frozen=True)
class FinishedRun:
    """One results folder.

    Attributes:
        folder: As it was given or found.
        recipe: recipe.yaml as plain values; empty for a model that was only evaluated.
        details: evaluation/scores.json.
    """

    folder: Path
    recipe: Mapping[str, Any]
    details: Mapping[str, Any]

    @property
    def train(self) -> Mapping[str, Any]:
        """Settings of the training, with the defaults that matter here."""
        return {**DEFAULTS, **(self.recipe.get("train") or {})}

    @property
    def data(self) -> Mapping[str, Any]:
        """Settings of the data."""
        return self.recipe.get("data") or {}

    @property
    def suite(self) -> Mapping[str, Any]:
        """The suite as it was resolved when the scores were made."""
        suite: Mapping[str, Any] = self.details["suite"]
        return suite

    @property
    def scores(self) -> Mapping[str, Mapping[str, Any]]:
        """By name: value, n, note, aggregate."""
        scores: Mapping[str, Mapping[str, Any]] = self.details["scores"]
        return scores

    @property
    def unlearned(self) -> bool:
        """Is this an unlearning run? Otherwise it is a model to unlearn, or a gold model."""
        return bool(self.recipe) and self.recipe.get("kind", "unlearn") == "unlearn"

    @property
    def model_path(self) -> str:
        """The model that the run began with; empty for a new one."""
        return str((self.recipe.get("model") or {}).get("path") or "")

    @property
    def family(self) -> str:
        """Name of the model that was unlearned: the last part of its path."""
        return family_of(self.model_path)

    @property
    def replicate(self) -> tuple[Any, Any]:
        """What may differ between runs that are averaged: (seed, task)."""
        return self.train["seed"], self.data.get("task_id")

    def setting(self, key: str) -> Any:
        """Give a setting by its dotted name, as --only takes it: suite.limit, train.seed...

        None for one that the run does not have.
        """
        value: Any = {
            "name": self.recipe.get("name"),
            "suite": self.suite,
            "model": {**(self.recipe.get("model") or {}), **self.details["model"]},
            "data": self.data,
            "train": self.train,
        }
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def is_folder(self, path: str | Path) -> bool:
        """Does a path in another run's recipe mean this folder?"""
        return Path(path).expanduser().resolve() == self.folder.resolve()

    @property
    def records(self) -> Path:
        """Where the records of the evaluation lie."""
        return self.folder / EVALUATION / RECORDS


def family_of(model_path: str) -> str:
    """Name a model by the last part of its folder or hub id."""
    return printable(Path(model_path).name) if model_path else "new model"


def scheme(train: Mapping[str, Any]) -> str:
    """Name how a run trains: its combination, its dual optimiser, or its schedule.

    Args:
        train: Settings as in a recipe.
    """
    settings = {**DEFAULTS, **train}
    kind = next((k for k in ("combine", "optimizer") if settings[k]), None)
    if kind is None:
        return str(settings["schedule"])
    name = str(settings[kind]).rpartition(":")[2]
    if (settings.get("optimizer_parameters") or {}).get("state_bits") == 8:
        name += " 8bit"
    unusual = settings["schedule"] != EXPECTED_SCHEDULE[kind]
    return f"{name} ({settings['schedule']})" if unusual else name


def find_runs(
    folders: Sequence[Path], only: Sequence[str] = ()
) -> tuple[list[FinishedRun], list[str]]:
    """Find the finished runs in folders and below.

    Args:
        only: "suite.limit=300": keep runs with this setting; values are YAML.

    Returns:
        The runs, by folder, and a line about each folder with scores that is none.

    Raises:
        UserError: a folder is missing, holds no run, or a file in it cannot be read.
    """
    wanted = [_selection(text) for text in only]
    found: dict[Path, FinishedRun] = {}
    left_out = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        for scores in sorted(folder.rglob(SCORES)):
            if _is_of_step(scores):
                continue
            run = _read(scores)
            if isinstance(run, str):
                left_out.append(run)
            elif run.folder.resolve() not in found:
                found[run.folder.resolve()] = run
    if not found:
        raise UserError(
            f"No finished run in {', '.join(map(str, folders))}: looked for {RECIPE} beside "
            f"{EVALUATION}/{SCORES}, which `unlearn train` leaves."
        )
    kept = [
        run for run in found.values() if all(run.setting(key) == value for key, value in wanted)
    ]
    if not kept:
        raise UserError(f"None of {len(found)} runs has {' and '.join(only)}.")
    return kept, left_out


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names; lists are leaves."""
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            yield from flattened(inner, f"{name}.")
        else:
            yield name, inner


def _read(scores: Path) -> FinishedRun | str:
    folder = scores.parent.parent
    if scores.parent.name != EVALUATION:
        return f"{scores} is left out: no {RECIPE} says how the model was made."
    details = read_details(scores)
    if not _is_whole(details):
        return f"{scores} is left out: it does not say which suite and model made it."
    file = folder / RECIPE
    return FinishedRun(folder, read_document(file) if file.is_file() else {}, details)


def _is_of_step(scores: Path) -> bool:
    """Were the scores taken while the run trained?"""
    folder = scores.parent.parent
    return folder.name == EVALUATION and (folder.parent / RECIPE).is_file()


def _is_whole(details: Mapping[str, Any]) -> bool:
    """Does scores.json hold what a table reads? Older ones, and other people's, may not."""
    suite, model = details.get("suite"), details.get("model")
    scores = details["scores"].values()
    return (
        isinstance(suite, Mapping)
        and {"name", "split"} <= suite.keys()
        and isinstance(model, Mapping)
        and all(isinstance(score, Mapping) and "value" in score for score in scores)
    )


def _selection(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--only: expected key=value such as suite.limit=300, got {text!r}.")
    return key, parse_yaml(value, f"--only {key}")
