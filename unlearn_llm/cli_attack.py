"""The command `unlearn attack`. Only words here: what it does is in attacking.py."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn_llm.errors import UserError
from unlearn_llm.safe_text import printable

commands = typer.Typer()


@commands.command()
def attack(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Folders or hub ids. KEY=VALUE sets an option of an attack "
            "(sampling.samples=32), of the verdict (rules.margin=0.02), or a setting of model. or "
            "data. (data.template=plain).",
        ),
    ],
    gold: Annotated[
        str | None,
        typer.Option(
            help="A model that never saw the forget set. Without one, no verdict above "
            "'suppressed'."
        ),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Rows that were to be forgotten; if not given, those of the model's run."
        ),
    ] = None,
    retain: Annotated[str | None, typer.Option(help="Rows that were kept; likewise.")] = None,
    attacks: Annotated[str | None, typer.Option(help="Such as prefix,sampling. None: all.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most forget rows, drawn by data.seed.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 200,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for attacks.json, one folder per model. Finished attacks in it are kept."
        ),
    ] = Path("outputs/attacks"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Try to get forgotten knowledge back: what was recovered, beside a gold model."""
    overrides = [word for word in models if "=" in word and not Path(word).exists()]
    names = [word for word in models if word not in overrides]
    if not names:
        raise UserError("attack: give at least one model.")
    from unlearn_llm.attacking import Request, attack_models

    with redirect_stdout(sys.stderr):
        found = attack_models(
            Request(
                names,
                gold,
                output,
                forget,
                retain,
                [name.strip() for name in (attacks or "").split(",") if name.strip()],
                overrides,
                limit,
                max_new_tokens,
            )
        )
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    for name, details in found.items():
        _show(name, details)
    print(f"wrote {output}")


def _show(name: str, details: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(Path(name).name or name)))
    for column in ("attack", "rows", "recovered", "verbatim", "gold", "verbatim", "worst rows"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for one in details["comparisons"]:
        table.add_row(
            one["trial"],
            str(one["model"]["n"]),
            *_cells(one["model"]),
            *(_cells(one["gold"]) if one["gold"] else ("-", "-")),
            " ".join(one["model"]["worst"]),
        )
    Console().print(table)
    verdict = details["verdict"]
    print(f"{printable(Path(name).name or name)}: {verdict['level']}")
    for reason in verdict["reasons"]:
        print(f"  {printable(reason)}")


def _cells(side: dict[str, Any]) -> tuple[str, str]:
    return f"{side['mean']:.3f}", "-" if side["leaked"] is None else str(side["leaked"])
