"""Errors that end a command with one line instead of a traceback."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UsageError(ValueError):
    """An option, or a file that an option names, cannot be used.

    The message names the option or file and the remedy. The command line prints the
    message as one line and exits with status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that an option names is missing."""


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Replaces names of arguments in the messages of UsageErrors.

    Functions name their arguments, as in "rates must be", "data_dir=None", or "pass
    data_dir", but users know options and flags. A name is replaced only in such places.
    After a flag, the equals sign becomes a space.

    Args:
      **names: New names by old names, such as `name="dataset"` or `rates="--rates"`.
    """
    try:
        yield
    except UsageError as error:
        name = rf"(?<![\w.-])({'|'.join(names) or '(?!)'})"
        pattern = rf"{name}(=None\b|=|(?= must\b))|(?<=pass ){name}\b"

        def replace(found: re.Match) -> str:
            new, end = names[found[1] or found[3]], found[2] or ""
            if not new.startswith("--"):
                return new + end
            return f"no {new}" if end == "=None" else new + end.replace("=", " ")

        error.args = (re.sub(pattern, replace, str(error)),)
        raise


@contextlib.contextmanager
def from_options(**names: str) -> Iterator[None]:
    """Converts a ValueError about values from options into a UsageError.

    Use it only around short calls that construct an object. Elsewhere, a ValueError can
    be a mistake in the code, which a traceback should show.

    Args:
      **names: Names of options by names of arguments, where they differ; see `renamed`.
    """
    with renamed(**names):
        try:
            yield
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error


def check_among(name: str, values: Iterable[str], choices: Iterable[str]) -> None:
    """Raises UsageError if any value is not one of the choices.

    The message suggests the choice whose spelling is closest.
    """
    by_lower_case = {choice.lower(): choice for choice in choices}
    known = by_lower_case.values()
    for value in values:
        if value in known:
            continue
        close = difflib.get_close_matches(value.lower(), by_lower_case, n=1)
        hint = f" Did you mean {by_lower_case[close[0]]!r}?" if close else ""
        raise UsageError(
            f"{name}={value!r} is unknown.{hint} Pass one of "
            f"{', '.join(map(repr, known))}."
        )
