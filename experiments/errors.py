"""Errors that end a command with one line instead of a traceback."""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """An option, or a file that one names, cannot be used.

    The message names the option or file and says what to do. The command line prints it
    as one line and exits with status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that an option names is missing."""


@contextlib.contextmanager
def from_options() -> Iterator[None]:
    """Turns a ValueError, raised on values that come from options, into a UsageError.

    Meant for short calls that only construct something: elsewhere a ValueError may be a
    mistake in the code, which a traceback should show.
    """
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
