"""Command line of the experiments. See `python -m experiments compare --help`."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from experiments import folders, report
from experiments.errors import UsageError, check_among, renamed
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
from experiments.training import provenance

# Maps each command name to its options class and its function. If the options are
# `RunOptions`, the function also receives an output that the command line closes.
COMMANDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "algorithms": (compare.Algorithms, compare.list_algorithms),
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
PROGRAM = "python -m experiments"


def parse(arguments: Sequence[str] | None = None) -> Any:
    """Parses a command line into the options of a command, without running it.

    Args:
      arguments: Arguments after `python -m experiments`, by default of this process.

    Raises:
      UsageError: If there is no command of that name.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    config = (tyro.conf.OmitArgPrefixes,)
    if name in COMMANDS:
        prog = f"{PROGRAM} {name}"
        return tyro.cli(COMMANDS[name][0], prog=prog, args=rest, config=config)
    if name and not name.startswith("-"):
        check_among("command", [name], COMMANDS)
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in COMMANDS.items()},
        prog=PROGRAM,
        description="Experiments with decentralized training algorithms. "
        "To print the versions of all packages, pass --version.",
        args=[name, *rest] if name else [],
        config=config,
    )


def run(options: Any) -> Any:
    """Runs the command that the options belong to, and returns its results.

    Raises:
      UsageError: If an option, or a file that an option names, cannot be used. The
        message names options by their flags.
    """
    name, command = next(
        (name, command)
        for name, (kind, command) in COMMANDS.items()
        if kind is type(options)
    )
    with renamed(**_flags(options)):
        if not isinstance(options, RunOptions):
            return command(options)
        options.check()
        # From here on, the options name the folder of this run.
        options.out = folders.claim(name, options)
        try:
            output = report.Output(options)
            results = command(options, output)
        except UsageError:
            folders.discard(options.out)
            raise
        output.close()
        return results


def main() -> None:
    """Runs the command line.

    Exits with status 2 if options or files cannot be used, and with status 130 after
    Ctrl-C, with the command that continues the run.
    """
    if sys.argv[1:] == ["--version"]:
        print(provenance.versions())
        return
    options = None
    try:
        options = parse()
        run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nInterrupted.{_continuation(options)}", file=sys.stderr)
        sys.exit(130)


def _continuation(options: Any) -> str:
    """Formats the command that continues an interrupted run, if there is one."""
    words = sys.argv[1:]
    if isinstance(options, RunOptions):
        if options.out is None:
            return ""
        if not any(word.startswith("--out") for word in words):
            words = [*words, "--out", str(options.out)]
        if not options.resume:
            words = [*words, "--resume"]
    elif not isinstance(options, tables.Tables):
        return ""
    return f" To continue, run:\n{PROGRAM} {shlex.join(words)}"


def _flags(options: Any) -> dict[str, str]:
    """Returns the flags of all options, including those of nested dataclasses."""
    flags = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            flags |= _flags(value)
        else:
            flags[field.name] = f"--{field.name.replace('_', '-')}"
    return flags
