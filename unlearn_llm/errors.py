"""What a user can do wrong, as exceptions that the command line prints in one line."""


class UserError(ValueError):
    """A mistake in what a user gave: data, model folder, recipe or command line.

    The message says what was got, what was expected and what to do. The command line prints it
    without a traceback and exits with 2.
    """


class RecipeError(UserError):
    """A recipe or an override that cannot be read: file, key, value, what was expected."""


class NonFiniteError(RuntimeError):
    """Training met a loss or a gradient that is not finite.

    Raised before the optimiser steps, so the weights in memory and the checkpoints on disk are
    those of the last good step. The command line exits with 3.
    """
