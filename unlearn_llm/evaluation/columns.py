"""The columns that aggregates read, and the registry that suites find aggregates in.

aggregates.py fills the registry; import `AGGREGATES` from there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unlearn_llm.evaluation.scores import Score
from unlearn_llm.registry import Registry

Columns = Mapping[str, Mapping[str, Sequence[Any]]]
"""columns[probe][metric]: one number, or None, per row; columns[probe]["id"]: the row ids."""
Aggregate = Callable[..., Score]

AGGREGATES: Registry[Aggregate] = Registry("aggregate")


def aggregate(name: str) -> Callable[[Aggregate], Aggregate]:
    """Register the decorated function, (columns, **options) -> Score, as the aggregate `name`."""

    def register(function: Aggregate) -> Aggregate:
        return AGGREGATES.add(name, function)

    return register


def of_column(
    columns: Columns, probe: str, metric: str, compute: Callable[[Sequence[Any]], Score]
) -> Score:
    """Compute a score of one column; a missing column gives a missing score."""
    values = column(columns, probe, metric)
    return values if isinstance(values, Score) else compute(values)


def column(columns: Columns, probe: str, metric: str) -> Sequence[Any] | Score:
    """Find a column, or say in a missing score what is not there."""
    if probe not in columns:
        return Score.missing(f"probe {probe!r} was not run")
    if metric not in columns[probe]:
        return Score.missing(f"metric {metric!r} was not taken on probe {probe!r}")
    return columns[probe][metric]


def by_id(columns: Columns, probe: str, metric: str) -> dict[str, Any] | Score:
    """Map row ids to the values of a column; ids that are absent or stand twice are refused."""
    values, ids = column(columns, probe, metric), column(columns, probe, "id")
    if isinstance(values, Score):
        return values
    if isinstance(ids, Score):
        return Score.missing(f"rows of probe {probe!r} have no ids to match them by")
    rows = dict(zip(ids, values, strict=True))
    if len(rows) < len(ids):
        return Score.missing(f"{len(ids) - len(rows)} row ids of probe {probe!r} stand twice")
    return rows
