"""Command lines of the benchmarks: what all of them have in common."""

import argparse
import sys
from collections.abc import Callable

from experiments.errors import UsageError
from experiments.training.provenance import versions


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with `--version`, described by the first line of a docstring."""
    result = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    result.add_argument("--version", action="version", version=versions())
    return result


def run(main: Callable[[], None]) -> None:
    """Runs the main function of a benchmark.

    Exits with status 2 and one line if an option cannot be used, and with status 130
    and one line after Ctrl-C.
    """
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
