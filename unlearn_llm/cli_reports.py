"""The commands that read finished runs: tables of them. They train nothing and load no model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from unlearn_llm.errors import UserError

commands = typer.Typer()
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex"}


@commands.command()
def leaderboard(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Where to look for finished runs. None: the tables of the papers.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Keep such runs, as in suite.limit=300."),
    ] = None,
    scores: Annotated[
        str | None, typer.Option(help="Scores to show, as in UFE,MU9,forget/rouge.")
    ] = None,
    published: Annotated[bool, typer.Option(help="Show what papers print, too.")] = True,
    style: Annotated[str | None, typer.Option("--format", help="markdown, csv or latex.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file ending in .md, .csv or .tex.")] = None,
) -> None:
    """Make the papers' tables of finished runs, beside what the papers print."""
    style = _style(style, output)
    from unlearn_llm.leaderboard import boards, formats
    from unlearn_llm.leaderboard.published import published_rows
    from unlearn_llm.leaderboard.runs import find_runs

    rows = published_rows() if published else []
    wanted = [name.strip() for name in (scores or "").split(",") if name.strip()]
    if folders:
        runs, unread = find_runs(folders, only or [])
        made, left_out = boards.make_boards(runs, rows, wanted)
        print(*unread, *left_out, sep="\n", end="\n" * bool(unread or left_out), file=sys.stderr)
    elif only or wanted or not published:
        raise UserError("leaderboard: give folders with runs; the papers' tables take no options.")
    else:
        made = boards.published_boards(rows)
    if style is None and sys.stdout.isatty():
        from rich.console import Console

        Console().print(formats.for_terminal(made))
        return
    _give(formats.FORMATS[style or "markdown"](made), output)


def _style(style: str | None, output: Path | None) -> str | None:
    """Settle the format: named, or by the file's suffix; None: whatever fits where it goes."""
    if style is not None and style not in SUFFIXES.values():
        raise UserError(f"--format: expected {', '.join(SUFFIXES.values())}, got {style!r}.")
    if output is None:
        return style
    by_suffix = SUFFIXES.get(output.suffix)
    if by_suffix is None and style is None:
        raise UserError(f"--output: expected a file ending in {', '.join(SUFFIXES)}, got {output}.")
    return style or by_suffix


def _give(text: str, output: Path | None) -> None:
    """Print a text, or write it whole into a file."""
    if output is None:
        print(text, end="")
        return
    from unlearn_llm.evaluation.records import write_whole

    write_whole(output, text)
    print(f"wrote {output}")
