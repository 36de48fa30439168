"""How much a run forgot and how much it kept, step by step: from its saved scores, as numbers."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import SCORES, write_whole
from unlearn_llm.evaluation.report import labels, read_details
from unlearn_llm.registry import did_you_mean
from unlearn_llm.safe_text import no_formula, printable

Details = dict[str, Any]
EVALUATION = "evaluation"
"""Folder in that of a run."""
STEP = re.compile(r"step-(\d+)")
MARKS = ("target", "gold")
"""Other models on the same rows: before unlearning, and one that never saw the forget set."""
FORGETTING = ("ufe",)
UTILITY = ("mu18", "mu9", "mu6")
FREE_IN_SUITE = {"folder", "reference", "objective_kind", "intervals"}
"""What may differ between runs in one figure: paths, and what no score on the axes reads."""
OF_MODEL = ("type", "template", "max_length")


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run.

    Attributes:
        label: How the run is called in the figure.
        steps: Details of each evaluation by step, in order.
        marks: Details of "target" and "gold", if there are any.
    """

    label: str
    steps: dict[int, Details]
    marks: dict[str, Details]

    @property
    def evaluations(self) -> dict[str, Details]:
        """All of them, by the name of their point."""
        return {**{str(step): details for step, details in self.steps.items()}, **self.marks}


class Axes(NamedTuple):
    """Names of the scores on the horizontal and the vertical axis."""

    x: str
    y: str


def step_folder(folder: Path, step: int) -> Path:
    """Say where the scores of a step lie in a run's evaluation folder."""
    return folder / f"step-{step}"


def read_curve(folder: Path, label: str) -> Curve:
    """Read step-N, target and gold in a run's evaluation folder.

    Raises:
        UserError: no step was evaluated.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := STEP.fullmatch(path.name)) and (path / SCORES).is_file()
    }
    if not found:
        raise UserError(
            f"{folder} holds no step-N/{SCORES}. Train with train.eval_strategy=steps "
            "train.eval_steps=N to have some."
        )
    steps = {step: read_details(found[step]) for step in sorted(found)}
    marks = {n: read_details(folder / n) for n in MARKS if (folder / n / SCORES).is_file()}
    return Curve(label, steps, marks)


def read_curves(runs: Sequence[Path]) -> list[Curve]:
    """Read the curves of several runs; see `read_curve`."""
    named = labels([str(run) for run in runs])
    return [read_curve(run / EVALUATION, printable(named[str(run)])) for run in runs]


def check_curves(curves: Sequence[Curve]) -> None:
    """Refuse to draw points together that were not measured alike; see `check_alike`."""
    for curve in curves:
        names = {f"{curve.label} {point}": found for point, found in curve.evaluations.items()}
        check_alike(names, of_model=False)
    check_alike({curve.label: next(iter(curve.steps.values())) for curve in curves})


def check_alike(evaluations: Mapping[str, Details], of_model: bool = True) -> None:
    """Refuse evaluations that were made of other rows, by other judges or otherwise.

    Raises:
        UserError: the first setting that differs, with its values.
    """
    (first, expected), *others = [
        (name, _measured_how(details, of_model)) for name, details in evaluations.items()
    ]
    for name, found in others:
        for key in expected:
            if found.get(key) != expected[key]:
                raise UserError(
                    f"{first} and {name} were measured with unlike {key}: {expected[key]!r:.60} "
                    f"and {found.get(key)!r:.60}."
                )


def choose_axes(curves: Sequence[Curve], x: str | None = None, y: str | None = None) -> Axes:
    """Find the scores to draw: those named, or forgetting and utility as the papers have them.

    Args:
        x, y: The name of a score, or of its aggregate in any case ("mu9" finds "MU9_proxy").

    Raises:
        UserError: there is no such score, or it was not measured in every step.
    """
    return Axes(
        _find(curves, [x] if x else FORGETTING, "--x"), _find(curves, [y] if y else UTILITY, "--y")
    )


def value(details: Details, name: str) -> float | None:
    """Give a score of an evaluation; None if it was not measured."""
    found: float | None = details["scores"].get(name, {}).get("value")
    return found


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """Write all scores: a row per run and point (a step's number, target, gold)."""
    every = [details for curve in curves for details in curve.evaluations.values()]
    names = list(dict.fromkeys(name for details in every for name in details["scores"]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "point", *map(no_formula, names)])
    for curve in curves:
        for point, details in curve.evaluations.items():
            writer.writerow([no_formula(curve.label), point, *(value(details, n) for n in names)])
    write_whole(path, file.getvalue())


def _measured_how(details: Details, of_model: bool) -> dict[str, Any]:
    suite = {f"suite.{k}": v for k, v in details["suite"].items() if k not in FREE_IN_SUITE}
    model = {f"model.{key}": details["model"].get(key) for key in OF_MODEL} if of_model else {}
    return {**suite, "judges": details.get("judges"), **model}


def _find(curves: Sequence[Curve], wanted: Sequence[str], option: str) -> str:
    steps = [details for curve in curves for details in curve.steps.values()]
    scores = steps[0]["scores"]
    named = {
        name: [n for n, s in scores.items() if name == n or name.lower() == s.get("aggregate")]
        for name in wanted
    }
    found = [name for names in named.values() for name in names]
    if not found:
        raise UserError(
            f"{option}: the evaluations have no score {wanted[0]!r}."
            f"{did_you_mean(wanted[0], scores)} Known: {', '.join(scores)}."
        )
    for name in found:
        if all(value(details, name) is not None for details in steps):
            return name
    note = next(d["scores"][found[0]]["note"] for d in steps if value(d, found[0]) is None)
    raise UserError(f"{option}: {found[0]} was not measured in every step: {note}")
