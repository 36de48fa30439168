"""Several evaluations side by side: a table for the terminal, the same for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.comparison import Difference
from unlearn_llm.evaluation.records import SCORES
from unlearn_llm.safe_text import printable

NOT_MEASURED = "not measured"
PERCENT = {"ufe", "tfe", "mu6", "mu9", "mu18", "ovr"}
"""Aggregates that the papers print times 100, with two decimals."""
P_VALUES = {"forget_quality"}


def read_details(path: str | Path) -> dict[str, Any]:
    """Read a scores.json, or the one in a folder.

    Raises:
        UserError: no such file, or not one of ours.
    """
    path = Path(path).expanduser()
    path = path / SCORES if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"There is no file {path} with the scores of an evaluation.")
    try:
        details: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        details["scores"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not hold the scores of an evaluation. Give a folder that `unlearn eval` "
            "wrote."
        ) from error
    return details


def side_by_side(
    evaluations: Mapping[str, Mapping[str, Any]],
    names: Sequence[str] | None = None,
    intervals: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arrange the scores of several models: [model][score] -> value, n, note, interval, text.

    Args:
        evaluations: The details of an Evaluation (or of a scores.json) by the model's name.
        names: Scores to show; None: all, in the order of the first model that has them.
        intervals: Let the texts show the confidence intervals.

    Returns:
        For every model every score; one that a model lacks has the value None.
    """
    if names is None:
        found = (name for details in evaluations.values() for name in details["scores"])
        names = list(dict.fromkeys(found))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model, details in evaluations.items():
        absent = {"value": None, "n": None, "note": "not in this suite"}
        scores = {name: details["scores"].get(name, absent) for name in names}
        rows[model] = {
            name: {
                **{key: score.get(key) for key in ("value", "n", "note", "interval")},
                "text": _text(score, intervals),
            }
            for name, score in scores.items()
        }
    return rows


def labels(paths: Sequence[str]) -> dict[str, str]:
    """Name folders by as many of their last parts as tell them apart: a/checkpoint-30.

    The names are harmless for a terminal.
    """
    found = {}
    for path in paths:
        parts = Path(path).parts
        others = [Path(other).parts for other in paths if Path(other).parts != parts]
        length = 1
        while length < len(parts) and any(o[-length:] == parts[-length:] for o in others):
            length += 1
        found[path] = printable("/".join(parts[-length:]) or path)
    return found


def table(
    evaluations: Mapping[str, Mapping[str, Any]],
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Table:
    """Make a table: one row per model, one column per score. See `side_by_side`."""
    rows = side_by_side(evaluations, names)
    made = Table("model", title=title)
    for name in next(iter(rows.values()), {}):
        # Folded, not cut: a name that loses its "_proxy" would pass for the published score. And as
        # Text: rich takes "[gold]" in a string, which may be a judge's name, for a colour.
        made.add_column(Text(name), justify="right", overflow="fold")
    for model, scores in rows.items():
        made.add_row(Text(model), *(score["text"] for score in scores.values()))
    return made


def _text(score: Mapping[str, Any], intervals: bool) -> str:
    aggregate, interval = score.get("aggregate"), score.get("interval")
    text = shown(score["value"], aggregate)
    if not intervals or interval is None:
        return text
    return f"{text} [{shown(interval['low'], aggregate)}, {shown(interval['high'], aggregate)}]"


def comparison(differences: Mapping[str, Difference], names: Sequence[str]) -> Table:
    """Make a table of two runs: one row per score, with the difference and how sure it is."""
    made = Table("score")
    for column in (*names, "difference", "interval", "p", "p (Wilcoxon)"):
        made.add_column(Text(column), justify="right")
    for name, each in differences.items():
        interval = each.interval and f"[{each.interval.low:+.4f}, {each.interval.high:+.4f}]"
        p_values = [None if p is None else f"{p:.3g}" for p in (each.p_value, each.wilcoxon)]
        gap = None if each.difference is None else f"{each.difference:+.4f}"
        scores = [shown(score.value) for score in (each.first, each.second)]
        made.add_row(Text(name), *scores, *(text or "" for text in (gap, interval, *p_values)))
    return made


def shown(value: float | None, aggregate: str | None = None) -> str:
    """Write a score as the papers do: composites times 100, p-values as powers of ten."""
    if value is None:
        return NOT_MEASURED
    if aggregate in PERCENT:
        return f"{100 * value:.2f}"
    return f"{value:.2e}" if aggregate in P_VALUES else f"{value:.4f}"
