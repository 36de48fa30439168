"""Lets lm-eval's tasks find their data in a user's folder, without the hub and without a cache."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from unlearn_llm.errors import UserError
from unlearn_llm.rows import READERS, read_file

SPLITS = {"train", "validation", "test", "dev"}
"""A folder with a file of such a name holds splits; others may hold anything."""


@contextmanager
def data_from(folder: str | None) -> Iterator[None]:
    """While this lasts, what `datasets.load_dataset` loads comes from a folder; None: as ever.

    The tasks of lm-eval name their data by an address on the hub. To name a folder instead, every
    task of a group would have to be written anew; so the one function that they all call is
    replaced while they are loaded.
    """
    if folder is None:
        yield
        return
    original = datasets.load_dataset
    datasets.load_dataset = reader_of(Path(folder).expanduser())
    try:
        yield
    finally:
        datasets.load_dataset = original


def reader_of(folder: Path) -> Callable[..., datasets.DatasetDict]:
    """Give a function that takes the place of `datasets.load_dataset`.

    For `openai/gsm8k` it reads FOLDER/gsm8k/train.jsonl, test.jsonl and so on, for the
    configuration `anatomy` of `cais/mmlu` FOLDER/mmlu/anatomy/...; shards (`test-00000-of-00001`)
    and parts (`train_200`) are found too, and the files may stand in FOLDER itself.
    """

    def read(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        short = path.rsplit("/", 1)[-1]
        inside = [folder / short, folder]
        places = [place / name for place in inside if name] + inside
        for place in places:
            splits = _splits(place)
            if splits:
                return datasets.DatasetDict(
                    {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
                )
        where = f"{short}/{name}" if name else short
        raise UserError(
            f"{folder} has no data of {path}{f' ({name})' if name else ''}: expected a folder "
            f"{where} or {short} with files such as test.jsonl and train.jsonl."
        )

    return read


def _splits(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the data files of a folder, by split; nothing if they are no splits."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in found if file.is_file() and file.suffix in READERS]
    named = [(re.split(r"[-_]\d", file.stem)[0], file) for file in files]
    if not SPLITS & {split for split, _ in named}:
        return {}
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, file in named:
        splits.setdefault(split, []).extend(read_file(file))
    return splits
