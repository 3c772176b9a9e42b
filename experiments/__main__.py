"""Starts the command line of the experiments, which `experiments.commands` defines."""

import os
import sys

# Modules that the extra `experiments` installs.
EXTRA = ("flax", "matplotlib", "plotly", "rich", "sklearn", "tyro")


def main() -> None:
    """Runs the command line; see `experiments.commands.main`.

    Exits with status 1 and one line if a package is missing, with status 130 after
    Ctrl-C, also while modules are being imported, and with status 141 if the reader of
    the output has closed it.
    """
    try:
        from experiments import commands

        commands.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*EXTRA, "jax", "networkx", "numpy", "optax"):
            raise
        sys.exit(
            f"error: the experiments need the package {package}, which is not "
            'installed: run pip install -e ".[experiments]" in the checkout.'
        )
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Redirect the broken output; flushing it at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
