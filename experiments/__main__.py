"""Command line of the experiments: `python -m experiments compare --help`."""

import sys

import tyro

from experiments import (
    apam,
    compare,
    d_grab,
    detag,
    error_feedback,
    faults,
    multi_level,
    synthetic,
)


def main() -> None:
    """Runs the experiment that the command line names."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "apam": _apam,
                "compare": _compare,
                "d-grab": _d_grab,
                "detag": _detag,
                "def": _def,
                "faults": _faults,
                "mll-sgd": _mll_sgd,
                "synthetic": _synthetic,
            },
            prog="python -m experiments",
            description="Experiments with decentralized training algorithms.",
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def _apam(options: tyro.conf.OmitArgPrefixes[apam.Apam]) -> None:
    """Asynchronous AMSGrad: accuracy against delay, and by the clock."""
    apam.main(options)


def _compare(options: tyro.conf.OmitArgPrefixes[compare.Compare]) -> None:
    """Compare every algorithm on one ring of workers with differing data."""
    compare.main(options)


def _d_grab(options: tyro.conf.OmitArgPrefixes[d_grab.DGraB]) -> None:
    """Orders that balance gradients: the herding test, and training."""
    d_grab.main(options)


def _detag(options: tyro.conf.OmitArgPrefixes[detag.DeTAG]) -> None:
    """Reproduce the DeTAG paper's figures: shuffled fractions, sparser rings."""
    detag.main(options)


def _def(options: tyro.conf.OmitArgPrefixes[error_feedback.ErrorFeedback]) -> None:
    """Detached error feedback at ratios 16, 64 and 256 against dense SGD."""
    error_feedback.main(options)


def _faults(options: tyro.conf.OmitArgPrefixes[faults.Faults]) -> None:
    """D-PSGD, DeTAG and CHOCO-SGD while workers are missing."""
    faults.main(options)


def _mll_sgd(options: tyro.conf.OmitArgPrefixes[multi_level.MultiLevel]) -> None:
    """Hubs and workers: hierarchies, operating rates, shapes, time slots."""
    multi_level.main(options)


def _synthetic(options: tyro.conf.OmitArgPrefixes[synthetic.Synthetic]) -> None:
    """Relative error on heterogeneous quadratics."""
    synthetic.main(options)


if __name__ == "__main__":
    main()
