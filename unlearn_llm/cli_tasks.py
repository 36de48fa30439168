"""The command that writes a suite as tasks of lm-eval."""

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command("export-tasks")
def export_tasks(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a tokenizer.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="As of `unlearn eval`."),
    ] = None,
    suite: Annotated[str, typer.Option(help="A name in eval/, or a .yaml file.")] = "tofu",
) -> None:
    """Write a suite as tasks of lm-eval, which can then score it alone."""
    from unlearn_llm.evaluating import export_suite

    names = export_suite(model, suite, overrides or [], folder)
    print(f"wrote {', '.join(names)}")
    print(f"lm-eval run --model hf --model_args pretrained={model} --include_path {folder} \\")
    print(f"    --tasks {suite}")
