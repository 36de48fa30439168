"""One cell of a table: several runs as one text, and which cells are best and second."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from unlearn_llm.evaluation.options import PROXY
from unlearn_llm.evaluation.report import NOT_MEASURED, P_VALUES, PERCENT
from unlearn_llm.evaluation.statistics import summarise_seeds

Direction = Literal["up", "down", "zero"]
NONE = "–"
"""Stands where a score has no meaning for a row, as in the papers' tables."""
UP = {
    "ufe", "tfe", "mu6", "mu9", "mu18", "ovr", "avg", "forget_quality", "model_utility",
    "arc-c", "mmlu", "truthfulqa", "triviaqa", "gsm8k", "ovr_safety", "safety avg", "utility avg",
    "i-malicious", "i-cona", "i-controversial", "q-harm", "retain_knowmem", "gpt-hm",
    "forget/token_entropy", "forget/refusal_entailment", "forget/truth_ratio",
}  # fmt: skip
DOWN = {
    "ks_statistic", "extraction_strength", "exact_memorization", "forget/verbatim",
    "forget/probability", "forget/rouge", "forget/similarity", "forget/entailment_from_generation",
    "forget_knowmem", "forget_verbmem", "xstest", "gpt-forget",
}  # fmt: skip
UTILITY_PROBES = ("retain/", "real_authors/", "world_facts/")


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: As it is printed.
        order: What cells are ranked by, as printed; None: not measured.
        numbers: mean, std, low, high, n; of p-values min, median, max, n. Unscaled.
        rank: 1 best, 2 second of its block and column, else 0.
    """

    text: str = NONE
    order: float | None = None
    numbers: Mapping[str, float | int | None] = field(default_factory=dict)
    rank: int = 0


def base_name(score: str) -> str:
    """Name a score without what it was made with: proxies and other judges than the papers'."""
    return score.partition(" [")[0].removesuffix(PROXY)


def direction(score: str) -> Direction | None:
    """Say which way a score is better; None: not known, so nothing is marked."""
    name = base_name(score).lower()
    if name == "privleak":
        return "zero"
    if name in UP or name.startswith(UTILITY_PROBES):
        return "up"
    return "down" if name in DOWN else None


def cell_of(values: Sequence[float | None], aggregate: str | None) -> Cell:
    """Make the cell of one score of several runs.

    Args:
        values: One per run; None: not measured.
        aggregate: What the score was made with; it decides how it is printed.

    Returns:
        Mean and half of the 95 % t interval. P-values differ by orders of magnitude, so theirs
        are smallest and greatest. A score that some of the runs lack is not measured: the mean
        of the others is of other runs than the rest of the row.
    """
    measured = [value for value in values if value is not None]
    if len(measured) < len(values) or not measured:
        some = f" in {len(values) - len(measured)} of {len(values)}" if measured else ""
        return Cell(NOT_MEASURED + some)
    if aggregate in P_VALUES:
        return _p_values(measured)
    summary = summarise_seeds(measured)
    scale, decimals = (100, 2) if aggregate in PERCENT else (1, 4)
    text = f"{scale * summary.mean:.{decimals}f}"
    order = float(text)
    if summary.low is not None and summary.high is not None:
        text += f" ± {scale * (summary.high - summary.low) / 2:.{decimals}f}"
    return Cell(text, order, summary._asdict())


def published_cell(value: float, score: str, scale: float, decimals: int | None) -> Cell:
    """Make the cell of a printed number.

    Args:
        decimals: As many as the paper prints; None: as ours are printed, beside which it stands.
    """
    name, ours = score.lower(), value / scale
    if name in P_VALUES:
        return _p_values([ours])
    if decimals is None:
        return cell_of([ours], name)
    small = 0 < abs(value) < 10.0**-decimals
    text = f"{value:.1e}" if small else f"{value:.{decimals}f}"
    return Cell(text, float(text), {"mean": ours})


def ranked(cells: Iterable[Cell | None], way: Direction | None) -> list[Cell | None]:
    """Mark the best and the second of some cells; equal prints share a rank."""
    given = list(cells)
    orders = [cell.order for cell in given if cell is not None and cell.order is not None]
    if way is None or len(orders) < 2:
        return given
    best = sorted({_badness(order, way) for order in orders})[:2]
    return [
        replace(cell, rank=best.index(_badness(cell.order, way)) + 1)
        if cell is not None and cell.order is not None and _badness(cell.order, way) in best
        else cell
        for cell in given
    ]


def _badness(order: float, way: Direction) -> float:
    return {"up": -order, "down": order, "zero": abs(order)}[way]


def _p_values(values: Sequence[float]) -> Cell:
    low, high = min(values), max(values)
    middle = statistics.median(values)
    text = _p(low) if math.isclose(low, high) else f"{_p(low)} to {_p(high)}"
    numbers = {"min": low, "median": middle, "max": high, "n": len(values)}
    return Cell(text, float(_p(middle)), numbers)


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"
