"""What goes wrong, said in one line on stderr, with an exit code (errors.py)."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, cast

import typer

from unlearn_llm.errors import DISK_FULL, NonFiniteError, Preempted, UserError, WriteError
from unlearn_llm.safe_text import printable

# typer has its own click or takes the one that is installed; this is the base of its errors.
ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])
OF_PATHS = {
    errno.EACCES: "there is no permission; change that, or give another file or folder",
    errno.EPERM: "there is no permission; change that, or give another file or folder",
    errno.EROFS: "the disk can only be read; give another folder",
    errno.ENOTDIR: "a part of it is a file; give another path",
    errno.EEXIST: "it, or a part of it, is a file; give another path",
    errno.EISDIR: "is a folder; give a file",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "links lead in a circle; give another path",
}
"""What a path of the user can be wrong with, met where it is opened."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn a mistake or a fault inside into one line and an exit code; programming errors pass."""
    try:
        yield
    except (UserError, NonFiniteError, WriteError, Preempted) as error:
        fail(str(error), error.exit_code)
    except ClickException as error:
        _fail_usage(error)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if error.errno in DISK_FULL:
            fail(f"{error}. Make room and go on; what was finished is on the disk.", 5)
        if error.errno not in OF_PATHS or error.filename is None:
            raise
        fail(f"{error.filename!s:.200}: {OF_PATHS[error.errno]}.", 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong in one line, control characters escaped."""
    line = printable(message)
    if "tqdm" in sys.modules:  # a bar may stand where the line has to go
        from tqdm import tqdm

        tqdm.write(f"error: {line}", file=sys.stderr)
    else:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def _fail_usage(error: BaseException) -> NoReturn:
    """Say which command could not be understood, and where its options stand."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message())  # type: ignore[attr-defined]
    if context is not None and message == context.get_help():
        print(message, file=sys.stderr)  # `unlearn` alone
        sys.exit(2)
    command = context.command_path if context is not None else "unlearn"
    fail(f"{' '.join(message.split()).rstrip('.')}. See `{command} --help`.", 2)
