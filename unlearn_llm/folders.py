"""Output folders: can they be written, and does no other run write there?

The lock is the operating system's, on a file in the folder. It goes with the process that holds it,
however that ends, so what a killed run leaves locks nobody out.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from unlearn_llm.errors import UserError

logger = logging.getLogger(__name__)
LOCK = ".unlearn.lock"
_held: dict[Path, IO[str]] = {}
_made: dict[Path, list[Path]] = {}


def check_output(folder: Path, name: str) -> None:
    """Refuse an output folder that is a file, that may not be written or that a run is writing.

    Args:
        name: What a user calls it, such as train.output_dir.

    Raises:
        UserError: saying which part of the path it is.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{name}: {there} is a file; give a folder.")
    effective = os.access in os.supports_effective_ids
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        raise UserError(
            f"{name}: there is no permission to write in {there}; give another folder, or change "
            "its permissions."
        )
    if there == folder and (folder / LOCK).is_file() and folder.resolve() not in _held:
        with (folder / LOCK).open("a+", encoding="utf-8") as file:
            _lock(file, fcntl.LOCK_SH, folder)  # shared: other ranks look at the same moment


@contextmanager
def alone() -> Iterator[None]:
    """Give back at the end what `take` has taken inside; folders it made go if they are empty."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            (folder / LOCK).unlink(missing_ok=True)
            _held.pop(folder).close()
            with suppress(OSError):  # the first that holds something stays, and those above
                for made in _made.pop(folder):
                    made.rmdir()


def take(folder: Path) -> None:
    """Make a folder and keep other runs out of it, until `alone` ends. All processes call it.

    Raises:
        UserError: on every process, if another run has it.
    """
    answer: list[str | None] = [None]
    state = PartialState()
    state.wait_for_everyone()  # no rank may look for another run's lock and find ours
    if state.is_main_process and folder.resolve() not in _held:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            _held[folder.resolve()] = _own(folder)
            _made[folder.resolve()] = [path.resolve() for path in new]
        except UserError as error:
            answer = [str(error)]
    broadcast_object_list(answer)
    if answer[0] is not None:
        raise UserError(answer[0])


def _own(folder: Path) -> IO[str]:
    """Lock the file in a folder for this process, and write into it whose it is."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except (FileExistsError, FileNotFoundError):
            if folder.exists() and not folder.is_dir():
                raise
            continue  # another run has just taken its empty folder away
        try:
            _lock(file, fcntl.LOCK_EX, folder)
        except UserError:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # the run that had it has just gone, and the file with it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _lock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            logger.warning(f"{folder} cannot be locked ({error}): start no second run there.")
            return
        file.seek(0)
        owner = file.read(200).strip()
        raise UserError(
            f"{folder} is being written by another run{f' ({owner})' if owner else ''}. Wait for "
            "it, stop it, or give another folder."
        ) from error
