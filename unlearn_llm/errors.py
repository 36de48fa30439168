"""What a user can do wrong, as exceptions that the command line prints in one line.

Exit codes of the command line: 0 done, 2 a mistake in what was given, 3 the run diverged, 5 the
disk is full, 130 Ctrl-C, 143 asked to go by a scheduler.
"""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, a quota or a limit that lets no more bytes in."""


class UserError(ValueError):
    """A mistake in what a user gave: data, model folder, recipe or command line.

    The message says what was got, what was expected and what to do. The command line prints it
    without a traceback and exits with 2.
    """

    exit_code = 2


class RecipeError(UserError):
    """A recipe or an override that cannot be read: file, key, value, what was expected."""


class NonFiniteError(RuntimeError):
    """Training met a loss or a gradient that is not finite, or larger than allowed.

    Raised before the optimiser steps, so the weights in memory and the checkpoints on disk are
    those of the last good step. The command line exits with 3.
    """

    exit_code = 3


class WriteError(RuntimeError):
    """A checkpoint or a model could not be written: the disk is full, or refuses.

    What was saved before is untouched. The command line exits with 5.
    """

    exit_code = 5


class Preempted(BaseException):
    """A scheduler has asked the process to go (SIGTERM, SIGUSR1).

    No Exception, so that no library takes it for a fault of its own, as with KeyboardInterrupt.
    The command line exits with 143, which is what a shell reports for SIGTERM.
    """

    exit_code = 143
