"""Tables as text: Markdown, CSV, LaTeX, or rich for a terminal. Names are escaped in each."""

import csv
import io
import itertools
import re
from collections.abc import Callable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unlearn_llm.leaderboard.boards import Board, Column, Line
from unlearn_llm.leaderboard.cells import NONE, Cell, direction
from unlearn_llm.safe_text import no_formula

ARROWS = {"up": "↑", "down": "↓", "zero": "→0", None: ""}
NUMBERS = ("mean", "std", "low", "high", "n", "min", "median", "max")
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$",
    "†": r"$^\dagger$", "–": "--", "<": r"$<$", ">": r"$>$", "|": r"$|$",
}  # fmt: skip
# An underscore inside a word means nothing in Markdown, and names are full of them.
MARKDOWN = re.compile(r"([\\`*\[\]<>|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def markdown(boards: Sequence[Board]) -> str:
    """Write tables in Markdown, each under an anchor and a heading."""
    return "\n".join(_markdown(board, name) for board, name in _named(boards))


def latex(boards: Sequence[Board]) -> str:
    """Write tables in LaTeX; they need the package booktabs, and say so."""
    said = "% \\usepackage{booktabs} % and \\usepackage[utf8]{inputenc} before 2018\n\n"
    return said + "\n".join(_latex(board, name) for board, name in _named(boards))


def as_csv(boards: Sequence[Board]) -> str:
    """Write one line per cell, in fractions as in scores.json, for other programs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    of_line = ("suite", "model", "objective", "method", "runs", "source")
    writer.writerow(["table", *of_line, "split", "score", "better", "text", *NUMBERS, "rank"])
    for board in boards:
        for line in _lines(board):
            for column, cell in line.cells.items():
                row = [board.title, board.suite, board.model, line.objective, line.method]
                row += [line.runs, line.source, column.split, column.score]
                row += [direction(column.score) or "", cell.text]
                numbers = ["" if n is None else n for n in map(cell.numbers.get, NUMBERS)]
                writer.writerow([*map(no_formula, row), *numbers, cell.rank or ""])
    return file.getvalue()


def for_terminal(boards: Sequence[Board]) -> Group:
    """Make tables for a terminal."""
    return Group(*itertools.chain.from_iterable(map(_rich, boards)))


def _named(boards: Sequence[Board]) -> list[tuple[Board, str]]:
    """Give every table a name of its own for anchors and labels."""
    named: dict[str, Board] = {}
    for board in boards:
        words = board.title.partition(" (")[0].lower().replace("+", "plus")
        name = plain = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
        for number in itertools.count(2):
            if name not in named:
                break
            name = f"{plain}-{number}"
        named[name] = board
    return [(board, name) for name, board in named.items()]


def _lines(board: Board) -> list[Line]:
    return [line for block in board.blocks for line in block]


def _heading(column: Column) -> str:
    name, brackets, _ = column.score.partition(" [")
    return f"{name}{'†' if brackets else ''} {ARROWS[direction(column.score)]}".strip()


def _runs(line: Line, board: Board) -> str:
    """Say how many runs made a line, or that a paper prints it."""
    return f"published: {line.source}" if line.source and not board.published else line.runs


def _cells(board: Board, line: Line, mark: Callable[[Cell], str]) -> list[str]:
    return [mark(line.cells.get(column, Cell(NONE))) for column in board.columns]


def _markdown(board: Board, name: str) -> str:
    splits = [f"{_md(c.split)}<br>" if c.split else "" for c in board.columns]
    heads = [split + _md(_heading(c)) for split, c in zip(splits, board.columns, strict=True)]
    rows = ["| objective | method | runs | " + " | ".join(heads) + " |"]
    rows.append("|---|---|---|" + "---:|" * len(heads))
    marks = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    for line in _lines(board):
        said = [_md(text) for text in (line.objective, line.method, _runs(line, board))]
        cells = _cells(board, line, lambda cell: marks[cell.rank].format(_md(cell.text)))
        rows.append("| " + " | ".join([*said, *cells]) + " |")
    table = "\n".join(rows)
    return f'<a id="{name}"></a>\n\n### {_md(board.title)}\n\n{table}\n\n{_md(board.note)}\n'


def _latex(board: Board, name: str) -> str:
    heads, rules, at = ["", "", ""], [], 4
    for split, group in itertools.groupby(board.columns, lambda column: column.split):
        width = len(list(group))
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(split)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    marks = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    blocks = []
    for block in board.blocks:
        rows = []
        for number, line in enumerate(block):
            objective = line.objective if number == 0 else ""
            said = [_tex(text) for text in (objective, line.method, _runs(line, board))]
            cells = _cells(board, line, lambda cell: marks[cell.rank].format(_tex(cell.text)))
            rows.append(" & ".join([*said, *cells]) + r" \\")
        blocks.append("\n".join(rows))
    names = [_tex(_heading(column)) for column in board.columns]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(board.title)}. {_tex(board.note)}}}",
            rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{lll{'r' * len(board.columns)}}}",
            r"\toprule",
            *(
                [" & ".join(heads) + r" \\", " ".join(rules)]
                if any(c.split for c in board.columns)
                else []
            ),
            " & ".join(["objective", "method", "runs", *names]) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join(blocks),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _rich(board: Board) -> list[Table | Text]:
    table = Table(title=Text(board.title))
    for name in ("objective", "method", "runs"):
        table.add_column(name, overflow="fold")
    for column in board.columns:
        # Folded, not cut: a name that loses its "_proxy" would pass for the published score.
        head = Text(f"{column.split}\n{_heading(column)}".strip())
        table.add_column(head, justify="right", overflow="fold")
    styles = {0: "", 1: "bold", 2: "underline"}
    for block in board.blocks:
        for line in block:
            said = [Text(text) for text in (line.objective, line.method, _runs(line, board))]
            cells = [line.cells.get(column, Cell(NONE)) for column in board.columns]
            table.add_row(*said, *(Text(cell.text, styles[cell.rank]) for cell in cells))
        table.add_section()
    return [table, Text(board.note + "\n")]


def _md(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


FORMATS: dict[str, Callable[[Sequence[Board]], str]] = {
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
}
