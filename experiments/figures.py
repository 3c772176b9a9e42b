"""Figures of training results: curves by family as PNG, and charts of HTML reports."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt

from experiments import report, styles
from experiments.html_report import Chart, Series
from experiments.training.results import Result


def by_family(results: Sequence[Result], name: str, title: str) -> Any:
    """Draws one column of panels per family of algorithms, with the baselines in each.

    The other families are gray in the background, for comparison.

    Args:
      results: Results of the algorithms.
      name: Measurement to plot, "train_loss" or "test_accuracy".
      title: Title of the figure.

    Returns:
      The matplotlib figure.
    """
    families = dict.fromkeys(styles.family(result.name) for result in results)
    if len(families) > 1:
        families.pop(styles.BASELINE, None)
    figure = plt.figure(figsize=(0.6 + 3.4 * len(families), 9.5), layout="constrained")
    axes = figure.subplots(
        len(report.AGAINST), len(families), sharex="row", sharey=True, squeeze=False
    )
    for column, family in zip(axes.T, families, strict=True):
        colored = family, styles.BASELINE
        shown = [r for r in results if styles.family(r.name) in colored]
        others = [r for r in results if styles.family(r.name) not in colored]
        for ax, against in zip(column, report.AGAINST, strict=True):
            for result in others:
                x, y = report.quantity(result, against), result.at_best(name).mean(0)
                ax.plot(x, y, color="0.85", lw=1, zorder=0)
            report.plot_curves(ax, shown, against, name)
            if ax not in axes[:, 0]:
                ax.set_ylabel("")
        column[0].legend(
            title=family,
            ncols=2,
            fontsize=8,
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
        )
    figure.suptitle(title)
    return figure


def chart(
    results: Sequence[Result],
    title: str,
    *,
    against: str = "iterations",
    seconds: str | None = None,
) -> Chart:
    """Returns the curves at the best rates, for the HTML report.

    Args:
      results: Results of the algorithms.
      title: Title of the chart.
      against: Quantity on the horizontal axis at first, a key of `report.AGAINST`.
      seconds: Name of `Result.seconds`, if it counts something else than seconds.

    Returns:
      The chart, with all measurements against iterations, bytes, and seconds.
    """
    labels = report.AGAINST | ({"seconds": seconds} if seconds else {})
    order = sorted(labels, key=lambda key: key != against)
    measurements = {
        "train loss": "train_loss",
        "test accuracy": "test_accuracy",
        "consensus distance": "consensus",
    }
    series = [
        Series(
            result.name,
            {labels[key]: report.quantity(result, key) for key in order},
            {label: result.at_best(name) for label, name in measurements.items()},
            f"rate {report.rate(result.rates, result.best)}",
        )
        for result in results
    ]
    return Chart(
        title, series, ("train loss", "consensus distance", labels["megabytes"])
    )
