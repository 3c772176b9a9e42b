"""Command line of the experiments: `python -m experiments compare --help`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

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

# From the name on the command line to the options and what runs with them.
COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "apam": (apam.Apam, apam.main),
    "compare": (compare.Compare, compare.main),
    "d-grab": (d_grab.DGraB, d_grab.main),
    "def": (error_feedback.ErrorFeedback, error_feedback.main),
    "detag": (detag.DeTAG, detag.main),
    "faults": (faults.Faults, faults.main),
    "mll-sgd": (multi_level.MultiLevel, multi_level.main),
    "synthetic": (synthetic.Synthetic, synthetic.main),
    "tables": (tables.Tables, tables.main),
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


def main() -> None:
    """Runs the experiment that the command line names."""
    options = parse()
    runs = dict(COMMANDS.values())
    try:
        runs[type(options)](options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
