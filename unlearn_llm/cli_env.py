"""The command that says with what the package runs, for bug reports."""

import json
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command()
def env(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Print versions and devices for a bug report: no paths, no names, no tokens."""
    from unlearn_llm.environment import describe

    found = describe()
    if as_json:
        print(json.dumps(found))
        return
    print(*(f"- {name}: {value}" for name, value in found.items()), sep="\n")
