"""The command `unlearn merge`. Only words here: what it does is in merge.py."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from unlearn_llm.errors import UserError

commands = typer.Typer()


@commands.command()
def merge(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or of any adapter.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the model that no run says, such as model.four_bit={}.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Make one model of an adapter and its base, and check that it is the same model.

    An adapter alone forgets nothing: its base model still knows, and the adapter can be left out.
    """
    for text in overrides or []:
        if not text.startswith("model."):
            raise UserError(f"merge: expected settings such as model.four_bit={{}}, got {text!r}.")
    from unlearn_llm.merging import merge_run

    with redirect_stdout(sys.stderr):
        merged = merge_run(run, output, overrides or [])
    if as_json:
        print(json.dumps({"folder": str(output), **merged._asdict()}))
        return
    print(f"{len(merged.changed)} of {merged.weights} weights changed (SHA-256).")
    print(
        f"Logits are the adapter's to {merged.in_memory:.1g}, read from the disk again to "
        f"{merged.reloaded:.1g}."
    )
    print(f"wrote {output}")
