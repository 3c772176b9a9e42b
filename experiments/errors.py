"""Errors that end a command with one line instead of a traceback."""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """An option, or a file that an option names, cannot be used.

    The message names the option or file and the remedy. The command line prints the
    message as one line and exits with status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that an option names is missing."""


@contextlib.contextmanager
def from_options() -> Iterator[None]:
    """Converts a ValueError about values from options into a UsageError.

    Use it only around short calls that construct an object. Elsewhere, a ValueError can
    be a mistake in the code, which a traceback should show.
    """
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
