"""Prediction by a Gaussian process, with NumPy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from energy.errors import ProfileError  # noqa: E402
from energy.thor.process import Process, prior  # noqa: E402
from tests.energy.synthetic_layers import cost, draw, parameters  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
ROWS = draw(np.random.default_rng(0), 20)
COSTS = [cost(row) for row in ROWS]


def process(**changes: list[float]) -> Process:
    return Process("conv2d", ROWS, COSTS, [0.01] * 20, parameters=parameters(20) | changes)


def test_points_are_predicted_as_measured_and_far_layers_with_wide_intervals() -> None:
    """At a point the prediction is near its measurement; far away it says that it does not know."""
    found = process().predict([*ROWS, {**ROWS[0], "batch": 10**6}])
    assert np.exp(found.mean[:20]) == pytest.approx(COSTS, rel=0.25)
    assert found.deviation[20] > 2 * found.deviation[:20].max()


def test_leaving_one_out_equals_fitting_without_it() -> None:
    """The closed form gives what a process of the other points says of each point."""
    closed = process().left_out()
    for place in (0, 7, 19):
        rest = [row for row in range(20) if row != place]
        others = Process(
            "conv2d",
            [ROWS[row] for row in rest],
            [COSTS[row] for row in rest],
            [0.01] * 19,
            parameters=parameters(19),
        )
        mean = others.predict([ROWS[place]]).mean[0]
        assert np.log(COSTS[place]) - mean == pytest.approx(closed.mean[place], abs=1e-6)


def test_posterior_agrees_with_the_prediction() -> None:
    """The joint posterior has the means of the prediction, and its variances without noise."""
    rows = draw(np.random.default_rng(1), 5)
    mean, covariance = process().posterior(rows)
    found = process().predict(rows)
    assert mean == pytest.approx(found.mean)
    assert np.diag(covariance) + process().noise_variance(mean) == pytest.approx(found.deviation**2)


def test_a_floor_makes_small_layers_noisier() -> None:
    """With an absolute error of the meter, the relative noise grows as the cost falls, and not without end."""
    noise = process(floor=[0.1]).noise_variance(np.array([-2.0, -4.0, -40.0]))
    assert noise[0] < noise[1] < noise[2] < 1.1


def test_doubted_points_count_less() -> None:
    """An outlier moves the prediction less when its doubt is large."""
    spoiled = [COSTS[0] * 5, *COSTS[1:]]

    def moved(doubt: float) -> float:
        believed = parameters(20) | {"doubt": [doubt] + [1.0] * 19}
        means = [
            Process("conv2d", ROWS, costs, [0.01] * 20, parameters=believed).predict(ROWS[:1]).mean[0]
            for costs in (COSTS, spoiled)
        ]
        return float(means[1] - means[0])

    assert 0 < moved(1000.0) < moved(1.0) / 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": [1.0, 2.0]}, "do not fit each other"),
        ({"columns": [99.0]}, "do not fit each other"),
        ({"doubt": [1.0]}, "fitted to 1 points, and there are 20"),
        ({"signal": [1e200]}, "signal of the model is not within 0 to 1000"),
        ({"length": [0.0]}, "length of the model is not within"),
        ({"scale": [0.0]}, "scale of the model is not within"),
        ({"noise": [float("nan")]}, "noise of the model is not within"),
        ({"offset": [1e9]}, "offset of the model is not within"),
        ({"roofline": [0.0, 0.0, 0.0, 0.0, 1.0]}, "roofline of the model cannot be"),
    ],
)
def test_damaged_parameters_are_refused(changes: dict[str, list[float]], words: str) -> None:
    """A model that does not fit its points is named, with the command that makes a new one."""
    with pytest.raises(ProfileError, match=words) as caught:
        process(**changes)
    assert "edge-energy fit" in str(caught.value)


def test_missing_parameters_and_free_layers_are_refused() -> None:
    """What is missing is named; a cost of nothing has no logarithm."""
    lacking = parameters(20)
    del lacking["noise"]
    with pytest.raises(ProfileError, match="lacks noise"):
        Process("conv2d", ROWS, COSTS, [0.01] * 20, parameters=lacking)
    with pytest.raises(ProfileError, match="costs nothing"):
        Process("conv2d", ROWS, [0.0, *COSTS[1:]], [0.01] * 20, parameters=parameters(20))


def test_prior_knows_nothing_but_the_scale_of_features() -> None:
    """Without a point every layer is as uncertain as the prior says."""
    found = prior("conv2d", ROWS).predict(ROWS)
    assert found.deviation.min() > 1.0
    assert np.ptp(found.mean) == 0.0


def test_prediction_needs_no_scipy() -> None:
    """Loading and predicting import NumPy, and neither SciPy nor torch."""
    code = "import sys, energy.thor.estimate, energy.thor.active, energy.thor.process; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not {"scipy", "torch", "onnxruntime"} & set(loaded.split())
