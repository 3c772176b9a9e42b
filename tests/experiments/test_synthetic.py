"""The synthetic problem: DeTAG is best, DSGT and D2 are close, D-PSGD is far behind."""

import numpy as np

from experiments import report
from experiments.runs import synthetic
from tests.experiments.files import read_charts


def test_order_and_size(tmp_path):
    options = synthetic.Synthetic(rates=(0.01, 0.03, 0.1, 0.3), seeds=4, out=tmp_path)
    errors = synthetic.run(options, report.Output(options))
    best = {
        name: np.exp(np.nanmin(np.log(error).mean(1))) for name, error in errors.items()
    }
    assert best["DeTAG"] < best["DSGT"] < best["D2"] < best["D-PSGD"]
    assert best["D2"] < 2 * best["DSGT"]
    assert best["D-PSGD"] > 10 * best["D2"]
    for name, quoted in synthetic.QUOTED.items():
        assert quoted / 2 < best[name] < quoted * 2
    assert (tmp_path / "synthetic.csv").exists()
    (chart,) = read_charts(tmp_path / "synthetic.html")
    assert list(chart) == list(errors)
