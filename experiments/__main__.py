"""Command line of the experiments. See `python -m experiments compare --help`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from experiments import report
from experiments.errors import UsageError
from experiments.runs import (
    apam,
    compare,
    d_grab,
    detag,
    error_feedback,
    faults,
    multi_level,
    synthetic,
    tables,
)
from experiments.settings import RunOptions

# Maps each command name to its options class and its function. If the options are
# `RunOptions`, the function also receives an output that the command line closes.
COMMANDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "apam": (apam.Apam, apam.run),
    "compare": (compare.Compare, compare.run),
    "d-grab": (d_grab.DGraB, d_grab.run),
    "def": (error_feedback.ErrorFeedback, error_feedback.run),
    "detag": (detag.DeTAG, detag.run),
    "faults": (faults.Faults, faults.run),
    "mll-sgd": (multi_level.MultiLevel, multi_level.run),
    "synthetic": (synthetic.Synthetic, synthetic.run),
    "tables": (tables.Tables, tables.run),
}


def parse(arguments: Sequence[str] | None = None) -> Any:
    """Parses a command line into the options of a command, without running it.

    Args:
      arguments: Arguments after `python -m experiments`, by default of this process.
    """
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in COMMANDS.items()},
        prog="python -m experiments",
        description="Experiments with decentralized training algorithms.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run(options: Any) -> Any:
    """Runs the command that the options belong to, and returns its results.

    Raises:
      UsageError: If an option, or a file that an option names, cannot be used.
    """
    command = dict(COMMANDS.values())[type(options)]
    if not isinstance(options, RunOptions):
        return command(options)
    options.check()
    output = report.Output(options)
    results = command(options, output)
    output.close()
    return results


def main() -> None:
    """Runs the command line; exits with status 2 if options or files cannot be used."""
    options = parse()
    try:
        run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
