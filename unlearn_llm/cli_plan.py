"""The command `unlearn plan`. Only words here: what it does is in planning/."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn_llm import recipe_files
from unlearn_llm.errors import UserError
from unlearn_llm.safe_text import printable

if TYPE_CHECKING:
    from unlearn_llm.planning.plan import Plan

commands = typer.Typer()
GIB = 2**30


@commands.command("plan")
def plan_run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or a name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace settings, such as train.bf16=true."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Such as H100 or RTX-4090; CPU. None: what is here.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="One per GPU.")] = 1,
    engine: Annotated[
        str | None,
        typer.Option(help="ddp, fsdp2, zero1, zero2 or zero3. None: ddp for several processes."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. None: those of the data.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Say what memory and time a recipe takes, before anything is loaded."""
    recipe_files.locate(recipe)  # a mistyped name is told before transformers is imported
    from unlearn_llm.planning.hardware import find
    from unlearn_llm.planning.memory import ENGINES
    from unlearn_llm.planning.plan import plan
    from unlearn_llm.recipe import Recipe

    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine: expected {', '.join(ENGINES)}, got {engine!r}.")
    loaded = Recipe.load(recipe, overrides or [])
    device = find(hardware)
    found = plan(loaded, device, processes=processes, engine=engine, length=length)
    if as_json:
        print(json.dumps(_plain(found), allow_nan=False))
    else:
        _show(loaded.name, found)


def _plain(found: "Plan") -> dict[str, Any]:
    return {
        "hardware": found.hardware._asdict(),
        "processes": found.processes,
        "engine": found.engine,
        "weights": found.weights.entries,
        "trained": found.weights.trained_entries,
        "bytes": found.memory.parts,
        "peak_bytes": found.memory.peak,
        "peak_moment": found.memory.moment,
        "needed_bytes": found.needed,
        "fits": found.fits,
        "steps": {_kind(kind): n for kind, n in found.steps.items()},
        "seconds_per_step": {_kind(kind): s for kind, s in found.seconds_per_step.items()},
        "seconds": found.seconds,
        "notes": found.notes,
    }


def _show(name: str, found: "Plan") -> None:
    from rich.console import Console
    from rich.table import Column, Table

    where = found.hardware.name
    if found.engine is not None:
        where = f"{found.processes} x {where}, {found.engine}, each"
    n, trained = found.weights.entries, found.weights.trained_entries
    print(
        printable(name), f"on {where}: {n / 1e6:,.1f} million weights, {trained / 1e6:,.1f} train"
    )
    table = Table("", Column("GiB", justify="right"))
    for part, size in found.memory.parts.items():
        if size:
            states = f" ({found.states.name})" if part == "optimiser states" else ""
            table.add_row(part + states, _gib(size))
    table.add_section()
    table.add_row(f"peak, in the {found.memory.moment}", _gib(found.memory.peak))
    table.add_row("driver and libraries, assumed", _gib(found.hardware.overhead))
    verdict = "fits" if found.fits else "does NOT fit"
    table.add_row(f"needed of {_gib(found.hardware.memory)}: {verdict}", _gib(found.needed))
    Console().print(table)
    for kind, seconds in found.seconds_per_step.items():
        if seconds:
            print(f"{found.steps[kind]} {_kind(kind)} steps of about {seconds:.3g} s")
    if found.seconds is not None:
        share, rate = found.hardware.utilisation, "of the peak rate"
        print(f"about {_duration(found.seconds)} in all: an estimate, at {share:.0%} {rate},")
        print("without loading, saving and evaluation")
    print(*map(printable, found.notes), sep="\n")


def _kind(kind: tuple[str, ...]) -> str:
    return " and ".join(kind) or "training"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
