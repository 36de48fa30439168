"""Did a run reach what the paper prints?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unlearn_llm.evaluation.scores import Score

if TYPE_CHECKING:  # a recipe imports transformers, and a table of published rows needs none
    from unlearn_llm.recipe import Published

OURS = {"UFE": "UFE", "TFE": "TFE", "MU": "MU18", "OVR": "OVR", "MC": "MU18", "FE": "UFE"}
"""Our name of a score that the papers name otherwise."""


@dataclass(frozen=True)
class Compared:
    """One score beside the paper's, both on the paper's scale.

    Attributes:
        ours: None if it was not measured.
        reached: None if it was not measured or no tolerance is named.
    """

    name: str
    ours: float | None
    published: float
    tolerance: float | None
    reached: bool | None
    source: str


def compare(published: "Sequence[Published]", scores: Mapping[str, Score]) -> list[Compared]:
    """Put every published score beside ours. Scores made with proxies have other names: no match.

    Avg is the mean of MC and FE (DualOptim).
    """
    found = []
    for row in published:
        ours = {name: _value(scores, of_suite, row.scale) for name, of_suite in OURS.items()}
        parts = [value for value in (ours["MC"], ours["FE"]) if value is not None]
        ours["Avg"] = sum(parts) / 2 if len(parts) == 2 else None
        for name, expected in row.scores.items():
            value, tolerance = ours.get(name), row.tolerance.get(name)
            reached = None
            if value is not None and tolerance is not None:
                reached = abs(value - expected) <= tolerance
            found.append(Compared(name, value, expected, tolerance, reached, row.source))
    return found


def _value(scores: Mapping[str, Score], name: str, scale: float) -> float | None:
    value = scores[name].value if name in scores else None
    return None if value is None else value * scale
