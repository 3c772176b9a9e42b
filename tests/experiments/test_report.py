"""Tables: marks at the best rates, and rows. Figures: which curve is where."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import figures, report, styles
from experiments.training.loop import Curves
from experiments.training.results import Result

RATES = (0.1, 0.2, 0.4)


def result(name, losses):
    """A result of two seeds with the given final training losses at the three rates."""
    loss = np.array(losses)[:, None, None] * np.ones((3, 2, 2))
    curves = Curves(np.array([10, 20]), loss, loss / 10, loss, 1.0)
    return Result(name, curves, np.array([1.0, 2.0]), np.zeros(2), RATES)


INSIDE, EDGE = result("A", [3, 1, 2]), result("B", [np.nan, 2, 1])


def test_rates_at_the_edge_have_a_star():
    assert [report.rate(RATES, i) for i in range(3)] == ["0.1*", "0.2", "0.4*"]
    assert report.rate((0.4, 0.1, 0.2), 0) == "0.4*"
    assert report.rate((0.1,), 0) == "0.1"


def test_comparison():
    table = report.comparison([INSIDE, EDGE], "A title")
    assert table.columns[1:3] == ("accuracy % after 10", "after 20")
    assert [row[0] for row in table.rows] == ["A", "B"]
    assert [row[-1] for row in table.rows] == ["0.2", "0.4*"]
    assert table.rows[0][1:4] == ("10.0 ± 0.0", "10.0 ± 0.0", "1.000 ± 0.000")
    text = table.markdown()
    assert text.startswith("A title:\n\n| algorithm | accuracy % after 10 | after 20 |")
    assert "| 0.4\\* |\n" in text
    assert text.endswith("\n\\" + report.EDGE + "\n")
    assert "edge" not in report.comparison([INSIDE], "A title").markdown()


def test_summary_uses_the_smaller_set_as_columns():
    two = report.summary({"none": [INSIDE, EDGE], "some": [EDGE, INSIDE]}, "digits")
    inside, edge = "10.0 ± 0.0, 1.000 (0.2)", "10.0 ± 0.0, 1.000 (0.4*)"
    assert two.columns == ("algorithm", "none", "some")
    assert [list(row) for row in two.rows] == [["A", inside, edge], ["B", edge, inside]]
    three = report.summary({name: [INSIDE, EDGE] for name in "xyz"}, "digits")
    assert three.columns == ("", "A", "B")
    assert [list(row) for row in three.rows] == [[name, inside, edge] for name in "xyz"]


def test_figures_have_one_column_per_family():
    names = ["all-reduce SGD", "D2", "DSGT", "DEF"]
    results = [result(name, [3, 1, 2]) for name in names]
    figure = figures.by_family(results, "train_loss", "A title")
    axes = np.reshape(figure.axes, (3, 2))
    expected = [["all-reduce SGD", "D2", "DSGT"], ["all-reduce SGD", "DEF"]]
    for column, shown in zip(axes.T, expected, strict=True):
        for ax in column:
            lines = {line.get_label(): line for line in ax.lines}
            colored = {n: line for n, line in lines.items() if n in names}
            assert list(colored) == shown
            for name, line in colored.items():
                assert line.get_color() == styles.STYLES[name].color
            # The others are there, in gray.
            assert len(ax.lines) == len(names)
        legend = [text.get_text() for text in column[0].get_legend().get_texts()]
        assert legend == shown
    titles = [ax.get_legend().get_title().get_text() for ax in axes[0]]
    assert titles == ["gossip with bias correction", "compression"]
    plt.close(figure)
