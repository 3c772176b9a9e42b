"""Command line of the experiments: `python -m experiments compare --help`."""

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

# From the name on the command line to the options and what runs with them and, where
# they are `RunOptions`, with the output that the command line opens and closes.
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
    """The options that a command line names, without running anything.

    Args:
      arguments: What follows `python -m experiments`; this process's if None.
    """
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in COMMANDS.items()},
        prog="python -m experiments",
        description="Experiments with decentralized training algorithms.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run(options: Any) -> Any:
    """Runs the command to which the options belong, and returns its results.

    Raises:
      UsageError: If an option, or a file that one names, cannot be used.
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
    """Runs the command line; exits with 2 if its options or files cannot be used."""
    options = parse()
    try:
        run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
