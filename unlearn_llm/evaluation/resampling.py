"""Columns as arrays, so that a score can be made of drawn rows a thousand times."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn_llm.evaluation.columns import Columns
from unlearn_llm.evaluation.scores import Array
from unlearn_llm.evaluation.statistics import cluster_numbers

ID, GROUP = "id", "group"

Arrays = dict[str, dict[str, Array]]
"""arrays[probe][metric]: (n,), NaN where a row could not be measured."""
Rows = NDArray[np.intp]


def as_arrays(columns: Columns, order_of: Columns | None = None) -> Arrays:
    """Turn columns into arrays; with `order_of` in the row order of these.

    A probe whose rows are not those of `order_of` is left out.
    """
    arrays: Arrays = {}
    for probe, of_probe in columns.items():
        if order_of is None:
            order = list(range(len(of_probe[ID])))
        elif sorted(of_probe[ID]) == sorted(order_of.get(probe, {}).get(ID, ())):
            position = {row: index for index, row in enumerate(of_probe[ID])}
            order = [position[row] for row in order_of[probe][ID]]
        else:
            continue
        arrays[probe] = {
            metric: np.array([values[index] for index in order], dtype=np.float64)
            for metric, values in of_probe.items()
            if metric not in (ID, GROUP)
        }
    return arrays


def take(arrays: Arrays, rows: Mapping[str, Rows]) -> Columns:
    """Take rows of every probe, one more than once if it was drawn so; each gets an id anew."""
    taken: dict[str, dict[str, Any]] = {}
    for probe, of_probe in arrays.items():
        taken[probe] = {metric: values[rows[probe]] for metric, values in of_probe.items()}
        taken[probe][ID] = np.arange(len(rows[probe]))
    return taken


def clusters_of(columns: Columns, by_author: bool) -> dict[str, Rows]:
    """Number the clusters of every probe's rows."""
    found = {}
    for probe, of_probe in columns.items():
        groups: Sequence[str | None] | None = of_probe.get(GROUP) if by_author else None
        found[probe] = cluster_numbers(groups, len(of_probe[ID]))
    return found
