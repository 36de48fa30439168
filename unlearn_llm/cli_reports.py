"""The commands that read finished runs: tables, other projects' formats. They load no model."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from unlearn_llm import cli_merge, cli_requests, cli_tasks
from unlearn_llm.errors import UserError

commands = typer.Typer()
commands.add_typer(cli_tasks.commands)
commands.add_typer(cli_merge.commands)
commands.add_typer(cli_requests.commands)
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


@commands.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder that `eval` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same rows.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the suite: intervals.by=row"),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="records.jsonl of a model that never saw the forget set.")
    ] = None,
    all_scores: Annotated[
        bool, typer.Option("--all", help="Show the members of the composites too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Say of each score whether two models differ by more than chance."""
    from unlearn_llm.comparing import compare_runs

    with redirect_stdout(sys.stderr):
        found, notes = compare_runs(first, second, overrides or [], reference)
    if as_json:
        print(json.dumps({name: asdict(each) for name, each in found.items()}, allow_nan=False))
        return
    from rich.console import Console

    from unlearn_llm.evaluation.report import comparison

    chosen = {name: each for name, each in found.items() if all_scores or "/" not in name}
    Console().print(comparison(chosen, [first.name, second.name]))
    notes += [f"{name} not compared: {each.note}" for name, each in chosen.items() if each.note]
    tested = sum(each.p_value is not None for each in chosen.values())
    notes.append(f"{tested} tests: of 20 equal scores one is below p = 0.05 by chance.")
    print(*notes, sep="\n")


@commands.command()
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs that were evaluated while they trained."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="A .svg, .png or .pdf file; else trade_off.svg or roc.svg."),
    ] = None,
    roc: Annotated[
        bool,
        typer.Option("--roc", help="ROC curves of membership attacks (--suite privacy)."),
    ] = False,
    x: Annotated[str | None, typer.Option(help="Score from left to right; else UFE.")] = None,
    y: Annotated[
        str | None, typer.Option(help="Score from below; else MU18, MU9 or MU6, what there is.")
    ] = None,
) -> None:
    """Draw what runs forgot against what they kept, step by step, with a .csv of all scores.

    Or, with --roc, how well attacks tell the forget set from rows that nobody trained on.
    """
    from unlearn_llm.evaluation import figure, roc_figure, trade_off

    output = output or Path("roc.svg" if roc else "trade_off.svg")
    if output.suffix not in figure.SUFFIXES:
        expected = ", ".join(figure.SUFFIXES)
        raise UserError(f"--output: expected a file ending in {expected}, got {output}.")
    if roc:
        if x or y:
            raise UserError("--roc: the axes are given; leave out --x and --y.")
        roc_figure.draw_roc(output, runs)
        print(f"wrote {output}")
        return
    curves = trade_off.read_curves(runs)
    trade_off.check_curves(curves)
    axes = trade_off.choose_axes(curves, x, y)
    table = output.with_suffix(".csv")
    trade_off.write_csv(table, curves)
    print(f"wrote {table}")
    figure.draw(output, curves, axes)
    print(f"wrote {output}")


@commands.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A finished run, or an evaluation.")
    ],
    style: Annotated[
        str, typer.Option("--format", help="tofu-csv, open-unlearning or model-index.")
    ],
    output: Annotated[Path | None, typer.Option(help="A file; else it is printed.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="records.jsonl of a gold model; else the one of the evaluation."),
    ] = None,
    submitted_by: Annotated[str, typer.Option(help="For tofu-csv: who you are.")] = "",
    show_forget_text: Annotated[
        bool,
        typer.Option(
            "--show-forget-text",
            help="For open-unlearning: write questions, answers and generations, too.",
        ),
    ] = False,
) -> None:
    """Write an evaluation in the format of another project."""
    from unlearn_llm.exchange.commands import export_folder

    _give(export_folder(folder, style, reference, submitted_by, show_forget_text), output)


@commands.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOFU_EVAL.json.")],
    output: Annotated[Path, typer.Option(help="Folder for records.jsonl and scores.json.")],
    style: Annotated[str, typer.Option("--format", help="open-unlearning.")] = "open-unlearning",
    reference: Annotated[
        Path | None, typer.Option(help="The retain model's TOFU_EVAL.json, or its records.jsonl.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Read an evaluation of another project into records of ours."""
    from unlearn_llm.exchange.commands import import_file

    scores = import_file(file, style, output, reference, overwrite)
    for name, score in scores.items():
        if "/" not in name and "_Q_A_" not in name:
            shown = "not measured" if score["value"] is None else f"{score['value']:.6g}"
            print(f"{name:22} {shown}")
    print(f"wrote {output}")


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
