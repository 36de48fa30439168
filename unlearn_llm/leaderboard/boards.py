"""From finished runs to tables: rows are methods, columns are splits and scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from unlearn_llm.errors import UserError
from unlearn_llm.leaderboard.cells import (
    NONE,
    Cell,
    base_name,
    cell_of,
    direction,
    published_cell,
    ranked,
)
from unlearn_llm.leaderboard.comparable import (
    AGAINST_REFERENCE,
    check_comparable,
    check_p_values,
    check_replicates,
)
from unlearn_llm.leaderboard.methods import labels
from unlearn_llm.leaderboard.published import PublishedRow, why_not_beside
from unlearn_llm.leaderboard.runs import FinishedRun
from unlearn_llm.registry import did_you_mean

SHOWN = ("UFE", "TFE", "MU18", "OVR", "model_utility", "forget_quality")
"""The scores of the papers' tables; a suite with none of them shows all that are no members."""
BASELINES = ("initial", "gold")
SCHEMES = (
    "joint",
    "alternate",
    "dual_adamw",
    "dual_adamw 8bit",
    "dual_adamw_plus",
    "dual_adamw_plus 8bit",
)
"""In the order of the papers' tables; others follow."""


class Column(NamedTuple):
    """One score on one split."""

    split: str
    score: str


@dataclass(frozen=True)
class Line:
    """One row: a method, and its cells. `source` is the paper of a published one, else empty."""

    objective: str
    method: str
    runs: str
    cells: Mapping[Column, Cell]
    source: str = ""


@dataclass(frozen=True)
class Board:
    """One table. Best and second are marked within a block, which has one objective.

    Attributes:
        note: What a reader must know of the numbers.
        published: All of it is from papers.
    """

    title: str
    suite: str
    model: str
    columns: list[Column]
    blocks: list[list[Line]]
    note: str
    published: bool = False


def make_boards(
    runs: Sequence[FinishedRun],
    published: Sequence[PublishedRow] = (),
    scores: Sequence[str] = (),
) -> tuple[list[Board], list[str]]:
    """Make one table for every suite and model of the runs; published rows beside or below.

    Args:
        scores: Names of the scores to show, without "_proxy"; none: those of the papers.

    Returns:
        The tables, and a line about each run that has no place in them.

    Raises:
        UserError: runs that cannot stand in one table; an unknown score.
    """
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        if run.unlearned:
            groups.setdefault((run.suite["name"], run.family), []).append(run)
    if not groups:
        raise UserError("No unlearning run here: no recipe.yaml beside an evaluation says so.")
    made = []
    placed = {run.folder for run in runs if run.unlearned}
    for (suite, model), members in groups.items():
        baselines = _baselines(runs, members)
        measured = [*baselines.values(), *members]
        check_comparable(measured)
        names = _score_names(measured, scores)
        rows = [row for row in published if row.suite == suite]
        made += _boards(suite, model, members, baselines, names, rows)
        placed |= {run.folder for run in baselines.values()}
    return made, [
        f"{run.folder} is left out: no run began with it or is compared with it."
        for run in runs
        if run.folder not in placed
    ]


def published_boards(rows: Sequence[PublishedRow]) -> list[Board]:
    """Make the papers' own tables: one for every paper, suite and model."""
    return [_published_board(group, "") for group in _by_paper(rows)]


def _boards(
    suite: str,
    model: str,
    members: Sequence[FinishedRun],
    baselines: Mapping[str, FinishedRun],
    names: Sequence[str],
    rows: Sequence[PublishedRow],
) -> list[Board]:
    splits = sorted({run.suite["split"] for run in members})
    for split in splits:
        check_p_values([run for run in members if run.suite["split"] == split], names)
    columns = [Column(split, name) for split in splits for name in names]
    ours = [
        _line(objective, method, found, columns)
        for (objective, method), found in labels(members).items()
    ]
    first = [_line("", name, [run], columns) for name, run in baselines.items()]
    wanted = {line.objective for line in ours} | {""}
    known = {base_name(name) for name in names}
    rows = [
        row
        for row in rows
        if row.objective in wanted and row.split in ("", *splits) and known & row.scores.keys()
    ]
    reasons = {id(row): why_not_beside(row, members[0], names) for row in rows}
    beside = [row for row in rows if not reasons[id(row)]]
    blocks = _blocks([*first, *ours, *_published_lines(beside, columns, None)])
    note = _note(members, names, beside)
    board = Board(f"{suite}, {model}", suite, model, columns, blocks, note)
    below = []
    for group in _by_paper([row for row in rows if reasons[id(row)]]):
        if all(row.method in BASELINES for row in group):
            continue
        said = ", ".join(dict.fromkeys(reason for row in group for reason in reasons[id(row)]))
        below.append(_published_board(group, f"not comparable: {said}", known))
    return [board, *below]


def _line(
    objective: str, method: str, runs: Sequence[FinishedRun], columns: Sequence[Column]
) -> Line:
    cells = {}
    by_split: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_split.setdefault(run.suite["split"], []).append(run)
    for found in by_split.values():
        check_replicates(found, f"{objective} {method}".strip())
    for column in columns:
        found = by_split.get(column.split, [])
        if found and not _meaningless(column.score, found[0]):
            scores = [run.scores.get(column.score, {}) for run in found]
            aggregate = next((s["aggregate"] for s in scores if "aggregate" in s), None)
            cells[column] = cell_of([score.get("value") for score in scores], aggregate)
    return Line(objective, method, _replicates(list(by_split.values())), cells)


def _meaningless(score: str, run: FinishedRun) -> bool:
    """Refusals are no aim of a loss that teaches none; gold is not compared with itself."""
    if base_name(score) == "TFE":
        return bool(run.suite.get("objective_kind") == "untargeted")
    against = run.scores.get(score, {}).get("aggregate") in AGAINST_REFERENCE
    return against and not run.unlearned and not run.details.get("reference")


def _replicates(found: Sequence[Sequence[FinishedRun]]) -> str:
    if not all(run.unlearned for runs in found for run in runs):
        return "1 model"
    counts = sorted({len(runs) for runs in found})
    tasks = {run.data.get("task_id") for runs in found for run in runs}
    if counts == [1]:
        seeds = {run.train["seed"] for runs in found for run in runs}
        return f"seed {seeds.pop()}" if len(seeds) == 1 else "1 seed"
    what = "tasks" if len(tasks) > 1 else "seeds"
    return f"{' to '.join(map(str, (counts[0], counts[-1])[: len(counts)]))} {what}"


def _baselines(
    runs: Sequence[FinishedRun], members: Sequence[FinishedRun]
) -> dict[str, FinishedRun]:
    """Find the model that the runs began with, and the one that they are compared with."""
    found = {}
    references = {str(run.details["reference"]) for run in members if run.details.get("reference")}
    for run in runs:
        if run.unlearned or run.suite["name"] != members[0].suite["name"]:
            continue
        if any(run.is_folder(other.model_path) for other in members if other.model_path):
            found["initial"] = run
        elif any(run.records.resolve() == Path(path).expanduser().resolve() for path in references):
            found["gold"] = run
    return {name: found[name] for name in BASELINES if name in found}


def _score_names(runs: Sequence[FinishedRun], wanted: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    bases = {base_name(name) for name in names}
    for name in wanted:
        if base_name(name) not in bases:
            raise UserError(
                f"--scores: no run has {name!r}.{did_you_mean(name, bases)} "
                f"They have {', '.join(sorted(bases))}."
            )
    chosen = [base_name(name) for name in wanted] or [name for name in SHOWN if name in bases]
    if not chosen:
        return [name for name in names if "/" not in name]
    return [name for base in chosen for name in names if base_name(name) == base]


def _note(
    members: Sequence[FinishedRun], names: Sequence[str], beside: Sequence[PublishedRow]
) -> str:
    said = []
    if any(run.replicate != members[0].replicate for run in members):
        said.append("mean ± half of the 95 % t interval over seeds or tasks; p-values: min to max")
    said.append("best bold, second underlined, within an objective")
    judges = sorted({name.partition(" [")[2].rstrip("]") for name in names} - {""})
    if judges:
        said.append(f"† read by {', '.join(judges)}, not by the papers' judges")
    if any(base_name(name) != name.partition(" [")[0] for name in names):
        said.append("_proxy: words are counted where the papers ask a model")
    for row in beside:
        said += [f"{row.paper}: {row.note}"] if row.note else []
    return "; ".join(dict.fromkeys(said)) + "."


def _by_paper(rows: Iterable[PublishedRow]) -> list[list[PublishedRow]]:
    groups: dict[tuple[str, str, str], list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault((row.paper, row.suite, row.model), []).append(row)
    return list(groups.values())


def _published_board(
    rows: Sequence[PublishedRow], reason: str, known: set[str] | None = None
) -> Board:
    first = rows[0]
    splits = sorted({row.split for row in rows})
    fullest_first = sorted(rows, key=lambda row: -len(row.scores))
    names = dict.fromkeys(name for row in fullest_first for name in row.scores)
    columns = [
        Column(split, name)
        for split in splits
        for name in names
        if (known is None or name in known)
        and any(row.split == split and name in row.scores for row in rows)
    ]
    notes = dict.fromkeys([row.note for row in rows if row.note])
    title = f"Published: {first.paper}, {first.suite}, {first.model}"
    return Board(
        title + (f" ({reason})" if reason else ""),
        first.suite,
        first.model,
        columns,
        _blocks(_published_lines(rows, columns, first.decimals)),
        "; ".join([*dict.fromkeys(row.source for row in rows), *notes]) + ".",
        published=True,
    )


def _published_lines(
    rows: Sequence[PublishedRow], columns: Sequence[Column], decimals: int | None
) -> list[Line]:
    lines: dict[tuple[str, str, str], dict[Column, Cell]] = {}
    for row in rows:
        cells = lines.setdefault((row.paper, row.objective, row.method), {})
        for column in columns:
            value = row.scores.get(base_name(column.score))
            if column.split == row.split and value is not None:
                name = base_name(column.score)
                cells[column] = published_cell(value, name, row.scale, decimals)
    return [
        Line(objective, method, "published", cells, source=paper)
        for (paper, objective, method), cells in lines.items()
    ]


def _blocks(lines: Sequence[Line]) -> list[list[Line]]:
    """Put lines of one objective together, ours before the papers', and mark best and second.

    What a paper prints is not ranked among ours, and neither are the baselines.
    """
    blocks: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.method not in BASELINES):
        baseline = line.method in BASELINES
        blocks.setdefault("" if baseline else f"of {line.objective}", []).append(line)
    for name, block in blocks.items():
        block.sort(key=lambda line: (bool(line.source), _place_of(line.method)))
        if name:
            sources = dict.fromkeys(line.source for line in block)
            blocks[name] = [line for source in sources for line in _marked(block, source)]
    return list(blocks.values())


def _place_of(method: str) -> int:
    names = (*BASELINES, *SCHEMES)
    name = method.partition(" (")[0]
    return names.index(name) if name in names else len(names)


def _marked(block: Sequence[Line], source: str) -> list[Line]:
    lines = [line for line in block if line.source == source]
    marked: list[dict[Column, Cell]] = [{} for _ in lines]
    for column in dict.fromkeys(column for line in lines for column in line.cells):
        cells = ranked((line.cells.get(column) for line in lines), direction(column.score))
        for of_line, cell in zip(marked, cells, strict=True):
            of_line[column] = cell or Cell(NONE)
    return [replace(line, cells=cells) for line, cells in zip(lines, marked, strict=True)]
