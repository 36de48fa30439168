"""Answers on disk as they come, so that an interrupted evaluation goes on where it stopped.

Each process has a file in private/ of the output folder. Its first line says of what the answers
are: model, tokenizer, settings, questions. Every further line is one batch, whole or not there, so
that what is left falls into the same batches again and gives the same numbers to the last bit.
Questions stand in it as hashes only.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from unlearn_llm.evaluation.requests import Request, Result
from unlearn_llm.private import PRIVATE, open_private, private_folder

logger = logging.getLogger(__name__)

PATTERN = "answers-*.jsonl"
RESULTS = {result.__name__: result for result in get_args(Result)}


class Journal:
    """The answers that a folder holds, and those that one process adds."""

    def __init__(
        self,
        folder: Path,
        origin: Mapping[str, Any],
        answers: Mapping[str, Result],
        process: int = 0,
    ) -> None:
        """Go on with a journal; see `read_journal`.

        Args:
            answers: What it holds by now, of all processes.
            process: The number of the process that adds.
        """
        self._folder = folder
        self._name = PATTERN.replace("*", str(process))
        self._origin = origin
        self._answers = dict(answers)

    def known(self, requests: Iterable[Request]) -> dict[Request, Result]:
        """Give those of the requests that are answered."""
        keys = {request: key_of(request) for request in requests}
        return {r: self._answers[key] for r, key in keys.items() if key in self._answers}

    def add(self, answers: Sequence[tuple[Request, Result]]) -> None:
        """Keep the answers of one batch: they are on the disk when this returns."""
        line = {key_of(request): [type(r).__name__, vars(r)] for request, r in answers}
        with open_private(private_folder(self._folder) / self._name, "a") as file:
            if file.tell() == 0:
                file.write(json.dumps(self._origin) + "\n")
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(folder: Path, origin: Mapping[str, Any]) -> dict[str, Result]:
    """Give the answers in a folder's journal, of all processes, by `key_of` their requests.

    A torn end is cut off. If the answers are of another origin they are removed, with a warning
    that says what differs. Only one process may call this, before any adds.
    """
    answers: dict[str, Result] = {}
    for path in _files(folder):
        lines, good_bytes = _whole_lines(path)
        if lines and lines[0] != (now := json.loads(json.dumps(origin))):
            logger.warning(
                "%s holds answers of an interrupted evaluation that differs in %s. They are not "
                "used; all is asked anew.",
                folder,
                ", ".join(_differences(lines[0], now)),
            )
            remove_journal(folder)
            return {}
        os.truncate(path, good_bytes)
        for line in lines[1:]:
            answers.update({key: _result(*stored) for key, stored in line.items()})
    return answers


def remove_journal(folder: Path) -> None:
    """Remove a journal that has done its work."""
    for path in _files(folder):
        path.unlink()


def key_of(request: Request) -> str:
    """Hash a request: 32 hexadecimal digits."""
    return digest([type(request).__name__, *vars(request).values()])[:32]


def digest(content: Any) -> str:
    """Hash plain values, as JSON: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted((folder / PRIVATE).glob(PATTERN))


def _whole_lines(path: Path) -> tuple[list[Any], int]:
    """Read the lines up to the first that is torn, and give the number of bytes they have."""
    lines, good_bytes = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            lines.append(content)
            good_bytes += len(line)
    return lines, good_bytes


def _result(kind: str, values: Mapping[str, Any]) -> Result:
    # JSON has no tuples.
    read = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return RESULTS[kind](**read)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
