"""Compares the examples of the documentation with the same training written by hand.

`python -m benchmarks.examples` prints, for each program in `docs/examples` that has a
counterpart in `benchmarks/examples/by_hand`, on eight fake CPU devices:

1. the metric of the example, of one worker with the total batch, and by hand;
2. the median time of a step of both, which take turns in one process;
3. the lines of code of both: lines that are not blank, comments, docstrings, or
   imports, in the definitions that `main` uses and that the two do not share.

It reads both folders, so a new program needs no entry here.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import ast
import contextlib
import io
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from benchmarks.examples import BY_HAND, EXAMPLES, load
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine


def programs() -> list[str]:
    """Returns the names of the examples that also exist by hand."""
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    return sorted(examples & {path.stem for path in BY_HAND.glob("*.py")})


def main() -> None:
    """Runs the benchmark and prints one row per program."""
    parser = command.parser(__doc__)
    parser.add_argument("--programs", nargs="+", default=programs(), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=30, help="pairs of timed steps")
    parser.add_argument(
        "--no-training", action="store_true", help="only time steps and count lines"
    )
    options = parser.parse_args()
    print(machine())
    columns = "metric", "one worker", "by hand", "ms", "by hand", "ratio"
    heads = (*columns, "lines", "by hand")
    print(f"{'program':<24}", *(f"{head:>10}" for head in heads))
    for name in options.programs:
        example, by_hand = load(name), load(name, BY_HAND)
        if unknown := [item for item in by_hand.SHARED if not hasattr(example, item)]:
            raise ValueError(
                f"SHARED of by_hand/{name}.py must hold names of docs/examples/"
                f"{name}.py, got {unknown}: remove them."
            )
        metrics = ["-"] * 3
        if not options.no_training:
            runs = example.main, by_hand.single_worker, by_hand.main
            metrics = [f"{_quietly(run):.3f}" for run in runs]
        times = in_turn(
            dict(zip(("ours", "by hand"), by_hand.steps(), strict=True)),
            options.repeats,
        )
        ours, theirs = times["ours"], times["by hand"]
        cells = [
            *metrics,
            *(f"{np.median(t):.1f}" for t in (ours, theirs)),
            f"{np.median(ours / theirs):.2f}",
            lines_of_code(EXAMPLES / f"{name}.py", by_hand.SHARED),
            lines_of_code(BY_HAND / f"{name}.py", by_hand.SHARED),
        ]
        print(f"{name:<24}", *(f"{cell:>10}" for cell in cells), flush=True)


def _quietly(run: Callable[[], float]) -> float:
    """Runs a program without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def lines_of_code(path: Path, shared: Collection[str]) -> int:
    """Counts the lines of a program that its author has to write.

    Args:
      path: The program.
      shared: Names of functions and classes that do not count. A program by hand may
        define one of them again, such as a model with other batch normalization.

    Returns:
      The number of lines that are not blank, comments, docstrings, or imports, in the
      top-level definitions that `main` uses, directly or through other definitions. A
      file that is loaded by `load` counts as an import.
    """
    text = path.read_text("utf-8")
    defined: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        for name in _names(node):
            defined[name] = node
    # All definitions that `main` reaches without passing through a shared one.
    found, new = set(), {"main"}
    while new:
        found |= new
        used = {
            node.id
            for name in new
            for node in ast.walk(defined[name])
            if isinstance(node, ast.Name)
        }
        new = (used & set(defined)) - found - set(shared)
    lines = set()
    for name in found:
        node = defined[name]
        lines |= set(range(_first_line(node), (node.end_lineno or 0) + 1))
        lines -= {line for inner in ast.walk(node) for line in _ignored(inner)}
    rows = text.splitlines()
    return sum(
        bool(rows[line - 1].strip()) and not rows[line - 1].strip().startswith("#")
        for line in lines
    )


def _names(node: ast.stmt) -> list[str]:
    """Returns the names that a top-level statement defines, except by imports."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        value = node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("load"):
            return []
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [
            name.id
            for target in targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        ]
    return []


def _first_line(node: ast.stmt) -> int:
    """Returns the first line of a statement, including its decorators."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(item.lineno for item in decorators)])


def _ignored(node: ast.AST) -> range:
    """Returns the lines of a docstring or of an import."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return range(node.lineno, (node.end_lineno or 0) + 1)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return range(node.lineno, (node.end_lineno or 0) + 1)
    return range(0)


if __name__ == "__main__":
    command.run(main)
