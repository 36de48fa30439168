"""Trade-off curves as a figure, and how any figure is written.

matplotlib is imported when one is drawn: few runs need it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.report import PERCENT
from unlearn_llm.evaluation.trade_off import FORGETTING, UTILITY, Axes, Curve, Details, value

NO_MATPLOTLIB = "it takes matplotlib: pip install 'unlearn_llm[report]'."
SUFFIXES = (".svg", ".png", ".pdf")
MARKERS = {"target": "s", "gold": "*"}
SETTINGS: Any = {"svg.hashsalt": "unlearn", "svg.fonttype": "none", "font.size": 9}
"""The same scores give the same file; text in an SVG stays text."""


def draw(path: Path, curves: Sequence[Curve], axes: Axes) -> None:
    """Draw curves into an .svg, .png or .pdf file, whole or not at all.

    Composites stand times 100, as in the papers.

    Raises:
        UserError: matplotlib is missing.
    """
    write_figure(path, (5.5, 4), lambda figure: _fill(figure.add_subplot(), curves, axes))


def write_figure(path: Path, inches: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Let a matplotlib figure be filled, and write it whole or not at all.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name}: {NO_MATPLOTLIB}") from error
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=inches, layout="constrained")
        fill(figure)
        temporary = path.with_name(f".{path.name}")
        try:
            date = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=date)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _fill(plot: Any, curves: Sequence[Curve], axes: Axes) -> None:
    """Draw lines and marks, and say what stands where."""
    handles: dict[str, Any] = {}
    for curve in curves:
        points = [_point(details, axes) for details in curve.steps.values()]
        (line,) = plot.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1)
        handles[curve.label] = line
        for step, point in _named(list(zip(curve.steps, points, strict=True))):
            plot.annotate(str(step), point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    for mark, x, y in dict.fromkeys(_marks(curves, axes)):
        handles[mark] = plot.scatter([x], [y], marker=MARKERS[mark], s=60, c="black", zorder=3)
    details = next(iter(curves[0].steps.values()))
    plot.set_xlabel(_shown(details, axes.x), parse_math=False)
    plot.set_ylabel(_shown(details, axes.y), parse_math=False)
    plot.grid(alpha=0.3)
    for text in plot.legend(list(handles.values()), list(handles)).get_texts():
        text.set_parse_math(False)


def _marks(curves: Sequence[Curve], axes: Axes) -> list[tuple[str, float, float]]:
    """Give target and gold where both scores were measured; runs of one model share theirs."""
    found = []
    for curve in curves:
        for mark, details in curve.marks.items():
            if value(details, axes.x) is not None and value(details, axes.y) is not None:
                found.append((mark, *_point(details, axes)))
    return found


def _named(points: list[tuple[int, Any]], most: int = 8) -> list[tuple[int, Any]]:
    """Choose the points whose step is written: all, or evenly some, and always the ends."""
    every = -(-len(points) // most)
    return [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _point(details: Details, axes: Axes) -> tuple[float, float]:
    x, y = (value(details, name) or 0.0 for name in axes)
    return x * _factor(details, axes.x), y * _factor(details, axes.y)


def _factor(details: Details, name: str) -> float:
    return 100.0 if details["scores"][name].get("aggregate") in PERCENT else 1.0


def _shown(details: Details, name: str) -> str:
    aggregate = details["scores"][name].get("aggregate")
    times = " x 100" if _factor(details, name) == 100.0 else ""
    meaning = {**dict.fromkeys(FORGETTING, ": forgotten →"), **dict.fromkeys(UTILITY, ": kept →")}
    return name + times + meaning.get(aggregate, "")
