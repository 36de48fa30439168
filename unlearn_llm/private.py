"""`private/`: the one place in a results folder where texts of rows and of answers may stand.

Whatever lies outside it holds numbers of rows, counts and scores, and may be shown to anybody.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unlearn_llm.errors import UserError

PRIVATE = "private"
OWNER_ONLY = 0o600
FOLDER_OF_OWNER = 0o700


def private_folder(folder: Path) -> Path:
    """Make the folder `private` in a folder; only its owner may look into it.

    Raises:
        UserError: it cannot be closed to others.
    """
    made = folder / PRIVATE
    folder.mkdir(parents=True, exist_ok=True)
    made.mkdir(mode=FOLDER_OF_OWNER, exist_ok=True)
    if stat.S_IMODE(made.stat().st_mode) != FOLDER_OF_OWNER:  # it was there already
        try:
            made.chmod(FOLDER_OF_OWNER)
        except OSError as error:
            raise UserError(
                f"{made} cannot be closed to other users ({error.strerror}). Give a folder of your "
                "own, on a file system that has permissions."
            ) from error
    return made


@contextmanager
def open_private(path: Path, mode: str) -> Iterator[IO[str]]:
    """Open a text file to write; from its first byte only its owner may read it.

    Args:
        mode: "w" or "a".
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, OWNER_ONLY)

    with open(path, mode, encoding="utf-8", newline="\n", opener=opener) as file:
        yield file
