"""Published data sets by name: where their rows are, in a user's folder or on the hub.

None of them comes with this package. Some may be used but not passed on, and some are in a
repository only; for these a message says which.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from unlearn_llm.errors import UserError
from unlearn_llm.registry import did_you_mean


class DataSet(NamedTuple):
    """Where the files of a data set are."""

    title: str
    """As in messages."""
    origin: str
    """Where a folder of its files comes from."""
    hub: str | None = None
    """`owner/name:config:split` on the hub, with {0}, {1}... for the folders and the file of a
    name, and {corpus} for the first with a capital; None: not there."""


DATA_SETS = {
    "tofu": DataSet("TOFU", "the data set locuslab/TOFU", "locuslab/TOFU:{0}"),
    "muse": DataSet(
        "MUSE", "the data set muse-bench/MUSE-News", "muse-bench/MUSE-{corpus}:{1}:{2}"
    ),
    "real_person": DataSet(
        "real-person", "data/real_world of github.com/sail-sg/closer-look-LLM-unlearning"
    ),
    "safety": DataSet("safety", "data/evaluation of github.com/vinid/safety-tuned-llamas"),
    "xstest": DataSet("XSTest", "github.com/paul-rottger/xstest", "Paul/XSTest"),
}


def hub_address(data_set: str, name: str) -> str:
    """Say where on the hub a file of a data set is, as `owner/name:config:split`.

    Raises:
        UserError: the data set is not on the hub.
    """
    found = DATA_SETS[data_set]
    if found.hub is None:
        raise UserError(
            f"The {found.title} data are not on the hub. Get them from {found.origin} and give "
            "their folder (folder=...)."
        )
    parts = name.split("/")
    try:
        return found.hub.format(*parts, corpus=parts[0].capitalize())
    except IndexError as error:
        raise UserError(
            f"{data_set}/{name} names no file of the {found.title} data; expected more parts, as "
            "in muse/news/verbmem/forget."
        ) from error


def find_file(data_set: str, folder: Path, name: str, suffixes: Collection[str]) -> Path:
    """Find the file of a data set in a folder, or in one below it.

    Args:
        name: Without its suffix; "news/verbmem/forget" is a file in folders of these names.

    Raises:
        UserError: there is no such file, or more than one.
    """
    title = DATA_SETS[data_set].title
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} with {title}'s files (data.folder).")
    if {"", ".", ".."} & set(name.split("/")):
        raise UserError(f"{data_set}/{name}: expected a name such as {data_set}/forget10.")
    for where in (folder.glob, folder.rglob):
        found = sorted(path for suffix in suffixes for path in where(f"{name}{suffix}"))
        if len(found) > 1:
            listed = ", ".join(str(path.relative_to(folder)) for path in found)
            raise UserError(
                f"{folder} has {title}'s {name!r} more than once: {listed}. Give the folder of one."
            )
        if found:
            return found[0]
    known = sorted(path.stem for path in folder.glob("*") if path.suffix in suffixes)
    raise UserError(
        f"{folder} has no {title} split {name!r}.{did_you_mean(name, known)} "
        f"It has {', '.join(known) or 'no data files'}."
    )
