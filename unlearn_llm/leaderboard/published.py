"""What papers print.

A row stands in one place only: with the recipe that reproduces it (recipes/), or, where no recipe
does, in eval/published/.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from unlearn_llm import recipe_files
from unlearn_llm.errors import RecipeError
from unlearn_llm.evaluation.strict import validated
from unlearn_llm.evaluation.suite import Strict, Suite
from unlearn_llm.leaderboard.cells import base_name
from unlearn_llm.leaderboard.runs import FinishedRun, family_of, scheme
from unlearn_llm.published import OURS
from unlearn_llm.resources import EVAL, RECIPES
from unlearn_llm.yaml_text import parse_yaml

FOLDER = EVAL / "published"
COORDINATES = ("suite", "model", "split", "objective", "method")


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper's table.

    Attributes:
        source: Paper and table.
        suite, model, split, objective, method: In our words; empty where the table has none.
        scores: By our name of the score, or the paper's own where we have none.
        scale: 1.0 of ours is this much in the paper.
        decimals: As many as the paper prints.
        protocol: Name of the recipe whose evaluation is the paper's; None: not known to us.
        note: What a reader must know.
    """

    source: str
    suite: str
    model: str
    split: str
    objective: str
    method: str
    scores: Mapping[str, float]
    scale: float = 100.0
    decimals: int = 2
    protocol: str | None = None
    note: str = ""

    @property
    def paper(self) -> str:
        """The paper's name, without its number and table."""
        return self.source.partition(",")[0].partition(" (")[0]


class Table(Strict):
    """One table of a file in eval/published/."""

    table: str
    of: dict[str, str] = Field(default_factory=dict)
    protocol: str | None = None
    scale: float = 100.0
    decimals: int = 2
    note: str = ""
    columns: list[str]
    rows: list[list[str | float | None]]


class File(Strict):
    """A file in eval/published/: the tables of one paper."""

    paper: str
    tables: list[Table]


@dataclass(frozen=True)
class Protocol:
    """How a recipe measures: what a run must share with it to stand beside its paper's rows."""

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def published_rows() -> list[PublishedRow]:
    """Read every published row, those of the recipes first."""
    return [*_of_recipes(), *_of_files(FOLDER)]


@cache
def protocol(name: str) -> Protocol:
    """Read how the recipe of this name measures."""
    path, chosen = recipe_files.locate(name)
    document = recipe_files.read_document(path)
    resolved = recipe_files.resolve(document, chosen, recipe_files.name_of(path), name)
    evaluate, data = resolved["evaluate"], resolved["data"]
    suite = Suite.load(evaluate["suite"], **evaluate.get("overrides", {}))
    asked = ("limit", "row_order", "max_new_tokens", "max_total_tokens")
    return Protocol(
        family_of(resolved["model"]["path"]),
        {
            **{f"suite.{key}": getattr(suite, key) for key in asked},
            "model.template": data.get("template", "chat"),
        },
    )


def why_not_beside(row: PublishedRow, run: FinishedRun, names: Sequence[str]) -> list[str]:
    """Say why a published row cannot stand in a table with a run; nothing: it can.

    Args:
        names: The scores of the table, with what they were made with.
    """
    reasons = []
    if any(base_name(name) != name.partition(" [")[0] for name in names):
        reasons.append("proxies")
    if any(" [" in name for name in names):
        reasons.append("other judges")
    if row.protocol is None:
        return [*reasons, "the paper's settings are not known"]
    measured = protocol(row.protocol)
    if run.family != measured.family:
        return [*reasons, "another model"]
    for key, theirs in measured.settings.items():
        ours = run.setting(key)
        if ours != theirs:
            reasons.append(f"{key.partition('.')[2]} {ours}, there {theirs}")
    return reasons


def _of_recipes() -> Iterator[PublishedRow]:
    for path in sorted(RECIPES.rglob("*.yaml")):
        document = recipe_files.read_document(path)
        if not document.get("published"):
            continue
        name, where = recipe_files.name_of(path), recipe_files.display(path)
        for chosen in recipe_files.variants(document, where):
            resolved = recipe_files.resolve(document, list(chosen.values()), name, where)
            for row in resolved["published"]:
                yield PublishedRow(
                    source=row["source"],
                    suite=resolved["evaluate"]["suite"],
                    model=Path(name).name,
                    split=resolved["data"]["forget"].rpartition("/")[2],
                    objective=resolved["train"]["objective"],
                    method=scheme(resolved["train"]),
                    scores={OURS.get(key, key): value for key, value in row["scores"].items()},
                    scale=row.get("scale", 100.0),
                    decimals=2 if row.get("scale", 100.0) == 100 else 4,
                    protocol=resolved["name"],
                    note=resolved.get("about", {}).get("data", ""),
                )


def _of_files(folder: Path) -> Iterator[PublishedRow]:
    for path in sorted(folder.glob("*.yaml")):
        where = f"eval/published/{path.name}"
        file = validated(File, parse_yaml(path.read_text(encoding="utf-8"), where), where)
        for table in file.tables:
            for row in table.rows:
                yield _row(file.paper, table, row, f"{where}, {table.table}")


def _row(paper: str, table: Table, row: list[str | float | None], where: str) -> PublishedRow:
    if len(row) != len(table.columns):
        raise RecipeError(f"{where}: expected {len(table.columns)} cells, got {row}.")
    cells: dict[str, Any] = {**table.of, **dict(zip(table.columns, row, strict=True))}
    placed = {name: str(cells.pop(name, "")) for name in COORDINATES}
    for name, value in cells.items():
        if isinstance(value, str):
            raise RecipeError(f"{where}: {name}: expected a number or null, got {value!r}.")
    return PublishedRow(
        source=f"{paper}, {table.table}",
        **placed,
        scores={name: value for name, value in cells.items() if value is not None},
        scale=table.scale,
        decimals=table.decimals,
        protocol=table.protocol.format(**placed) if table.protocol else None,
        note=table.note,
    )
