"""Words for chains of requests: `--continue-from`, `unlearn requests`, `unlearn release`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn_llm.errors import UserError
from unlearn_llm.safe_text import printable

commands = typer.Typer()
ContinueFrom = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Unlearn RUN's model further; what it forgot stays so."),
]


def continued(run: Path | None, overrides: Sequence[str] | None) -> list[str]:
    """Say `--continue-from RUN` as overrides of a recipe, after the others.

    An adapter is trained further, so a recipe that would add a fresh one is not to.
    """
    given = list(overrides or [])
    if run is None:
        return given
    if not run.is_dir():
        raise UserError(f"--continue-from: there is no folder {run}.")
    fresh = ["model.lora=null", "model.extra={}"] if (run / "adapter_config.json").is_file() else []
    return [*given, f"model.path={json.dumps(str(run))}", "model.continued=true", *fresh]


@commands.command()
def requests(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `unlearn train`.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Show what a model was asked to forget, one request after the other; check the chain."""
    from unlearn_llm.ledger import check_chain

    entries = check_chain(run)
    if as_json:
        print(json.dumps(entries, allow_nan=False))
        return
    for entry in entries:
        print(printable(f"{entry['request']}  {entry['time']}  {_said(entry)}"))
    print(f"The weights in {run} are those that the last request ended with.")


@commands.command()
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `unlearn train`.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Release an adapter that is not merged.")
    ] = False,
    original: Annotated[
        Path | None, typer.Option(help="The model before, if it lies elsewhere than the run says.")
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to look for in the files, as often as there are sources; else those of the "
            "last request."
        ),
    ] = None,
    unscanned: Annotated[
        bool, typer.Option("--unscanned", help="Do not look for the forget rows: they are gone.")
    ] = False,
) -> None:
    """Copy what may be shared of a finished run: weights, settings, tokenizer, a model card."""
    if forget and unscanned:
        raise UserError("release: give --forget or --unscanned; one of the two.")
    from unlearn_llm.release.folder import release as make

    made = make(
        run, output, adapter=adapter, original=original, forget=forget or [], unscanned=unscanned
    )
    print(*(printable(note) for note in made.notes), sep="\n")
    print(f"wrote {output}: {', '.join(made.files)}")


def _said(entry: dict[str, Any]) -> str:
    if entry["event"] == "asked":
        said = (
            f"asked: {entry['forget_rows']} rows, {entry['objective']}, {entry['recipe']['name']}"
        )
        left_out = entry["retain_rows_left_out"]
        return said + (f"; {left_out} retain rows left out" if left_out else "")
    measured = {name: value for name, value in (entry["scores"] or {}).items() if value is not None}
    scores = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    return f"done: weights {entry['weights'][:12]}, {scores or 'not measured'}"
