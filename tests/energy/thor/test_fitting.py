"""Fitting Gaussian processes to measured layers."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("scipy")

from energy.cli import main  # noqa: E402
from energy.errors import ProfileError  # noqa: E402
from energy.thor.features import features  # noqa: E402
from energy.thor.fitting import _Data, _Problem, fit, fit_profile, left_out_error  # noqa: E402
from energy.thor.process import Process  # noqa: E402
from energy.thor.profile import Cost, Device, Family, Point, Profile, load_profile, save_profile  # noqa: E402
from tests.energy.synthetic_layers import cost, draw, measured  # noqa: E402


def fitted(count: int, noise: float, seed: int = 0) -> tuple[Process, dict[str, list[float]]]:
    random = np.random.default_rng(seed)
    rows = draw(random, count)
    joules = measured(random, rows, noise)
    found = fit("conv2d", rows, joules, [0.0] * count)
    process = Process("conv2d", rows, joules, [0.0] * count, parameters=found.parameters, spread=found.spread)
    return process, found.parameters


def test_held_out_layers_are_predicted_within_their_intervals() -> None:
    """60 noisy points predict other layers within a few per cent, and 90 % intervals hold 80 to 97 % of them."""
    process, parameters = fitted(60, 0.05)
    random = np.random.default_rng(99)
    hidden = draw(random, 300)
    joules = np.array(measured(random, hidden, 0.05))
    found = process.predict(hidden)
    assert parameters["block"] == [8.0]
    assert np.median(np.abs(np.exp(found.mean) / joules - 1)) < 0.06
    inside = np.abs(np.log(joules) - found.mean) < 1.6449 * found.deviation
    assert 0.80 <= inside.mean() <= 0.97


def test_outliers_are_doubted() -> None:
    """A counter that slipped on a few points spoils neither the others nor the noise."""
    random = np.random.default_rng(3)
    rows = draw(random, 60)
    joules = measured(random, rows, 0.02)
    for place in (5, 25, 45):
        joules[place] *= 3.0
    found = fit("conv2d", rows, joules, [0.0] * 60, quick=True)
    doubts = found.parameters["doubt"]
    assert min(doubts[place] for place in (5, 25, 45)) > 2 * float(np.median(doubts))
    process = Process("conv2d", rows, joules, [0.0] * 60, parameters=found.parameters)
    hidden = draw(random, 100)
    error = np.abs(np.exp(process.predict(hidden).mean) / np.array([cost(row) for row in hidden]) - 1)
    assert np.median(error) < 0.08


def test_points_measured_badly_count_less() -> None:
    """A point with a large relative error of its own is not followed."""
    random = np.random.default_rng(4)
    rows = draw(random, 30)
    joules = measured(random, rows, 0.01)
    joules[0] *= 1.5
    close, far = (
        fit("conv2d", rows, joules, [error, *[0.01] * 29], quick=True).parameters["noise"][0] for error in (0.01, 0.5)
    )
    assert far < close


def test_gradient_is_that_of_the_loss() -> None:
    """The analytic gradient agrees with finite differences, whatever the doubts."""
    random = np.random.default_rng(5)
    rows = draw(random, 25)
    data = _Data("conv2d", rows, measured(random, rows), [0.02] * 25)
    problem = _Problem(data, features("conv2d", rows, 8))
    problem.expect(random.normal(0, 0.1, 25), 1 + random.random(25))
    logs = problem.mean + random.normal(0, 0.2, len(problem.mean))
    step = 1e-5
    numeric = [
        (problem.loss(logs + step * unit)[0] - problem.loss(logs - step * unit)[0]) / (2 * step)
        for unit in np.eye(len(logs))
    ]
    assert problem.loss(logs)[1] == pytest.approx(numeric, abs=1e-4)


def test_same_points_and_seed_give_the_same_model() -> None:
    """Fitting is reproducible."""
    assert fitted(20, 0.03)[1] == fitted(20, 0.03)[1]


@pytest.mark.parametrize("count", [4, 5])
def test_few_points_of_one_size_still_make_a_model(count: int) -> None:
    """An optimiser with a handful of points, one feature, is fitted."""
    rows = [{"elements": 10**place} for place in range(2, 2 + count)]
    found = fit("optimizer-sgd", rows, [1e-6 * row["elements"] + 1e-4 for row in rows], [0.02] * count)
    process = Process(
        "optimizer-sgd",
        rows,
        [1e-6 * row["elements"] + 1e-4 for row in rows],
        [0.02] * count,
        parameters=found.parameters,
    )
    assert np.isfinite(process.predict([{"elements": 5000}]).mean).all()


def test_points_that_are_all_alike_make_a_constant() -> None:
    """Without any size that varies, the cost is the mean of the points."""
    rows = [{"batch": 32, "in_positions": 10, "out_positions": 10}] * 6
    joules = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95]
    found = fit("relu", rows, joules, [0.05] * 6)
    process = Process("relu", rows, joules, [0.05] * 6, parameters=found.parameters, spread=found.spread)
    assert np.exp(process.predict(rows[:1]).mean[0]) == pytest.approx(1.0, rel=0.05)


def test_too_few_points_and_free_layers_are_refused() -> None:
    """The kind is named, and what to do."""
    with pytest.raises(ProfileError, match=r"conv2d: 2 points.*profile more"):
        fit("conv2d", draw(np.random.default_rng(0), 2), [1.0, 1.0], [0.0, 0.0])
    with pytest.raises(ProfileError, match="costs nothing"):
        fit("conv2d", draw(np.random.default_rng(0), 4), [1.0, 1.0, 0.0, 1.0], [0.0] * 4)


def _measured_profile(quantities: tuple[str, ...] = ("cpu_seconds", "seconds")) -> Profile:
    random = np.random.default_rng(6)
    rows = draw(random, 24)
    points = [
        Point(sizes=row, costs={quantity: Cost(mean=value, relative_error=0.01) for quantity in quantities})
        for row, value in zip(rows, measured(random, rows), strict=True)
    ]
    device = Device(name="bench", board="", cpu="")
    families = [Family(kind="conv2d", points=points)]
    return Profile(device=device, quantity="cpu_seconds", families=families, fixed={"cpu_seconds": 0.0})


def test_fit_command_fits_what_a_device_only_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``edge-energy fit`` writes models for every quantity, keeps the points, and prints their errors."""
    source, target = tmp_path / "measured.json", tmp_path / "fitted.json"
    save_profile(_measured_profile(), source)
    assert main(["fit", str(source), "-o", str(target)]) == 0
    found = load_profile(target)
    assert set(found.families[0].fitted) == {"cpu_seconds", "seconds"}
    assert found.families[0].points == load_profile(source).families[0].points
    assert found == fit_profile(load_profile(source))
    assert left_out_error(found.families[0], "seconds") < 0.1
    assert "conv2d" in capsys.readouterr().out


def test_kinds_with_too_few_points_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One kind with three points: the others are fitted, a note says what is missing, and says so once."""
    measured_only = _measured_profile()
    few = Family(kind="relu", points=measured_only.families[0].points[:3])
    path = tmp_path / "p.json"
    save_profile(msgspec.structs.replace(measured_only, families=[few, *measured_only.families], notes=["hot"]), path)
    for _ in range(2):
        assert main(["fit", str(path)]) == 0
        found = load_profile(path)
        assert [(family.kind, bool(family.fitted)) for family in found.families] == [("relu", False), ("conv2d", True)]
        assert found.families[0] == few
        assert found.notes == ["hot", "too few points to fit relu: 4 are needed; estimates lack it"]
        assert "note: too few points to fit relu" in capsys.readouterr().out


def test_quantities_of_few_points_are_left_out() -> None:
    """Joules of three layers only, the others doubtful: seconds are fitted all the same."""
    profile = _measured_profile(("seconds",))
    joules = Cost(mean=1.0, relative_error=0.01)
    family = profile.families[0]
    points = [
        Point(sizes=point.sizes, costs={**point.costs, **({"joules": joules} if row < 3 else {})})
        for row, point in enumerate(family.points)
    ]
    family = Family(kind="conv2d", points=points)
    found = fit_profile(msgspec.structs.replace(profile, quantity="joules", families=[family]))
    assert set(found.families[0].fitted) == {"seconds"}
    assert "too few points to fit conv2d" in found.notes[0]


def test_a_profile_of_few_points_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be fitted: one line with what to do, and the file stays as it is."""
    profile, path = _measured_profile(), tmp_path / "p.json"
    family = Family(kind="conv2d", points=profile.families[0].points[:3])
    save_profile(msgspec.structs.replace(profile, families=[family]), path)
    before = path.read_bytes()
    assert main(["fit", str(path)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_seed_of_the_command_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """It orders the points that are left out in turn; the fit has no restarts."""
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "order in which points are left out" in said
    assert "restarts" not in said


def test_error_on_real_convolutions() -> None:
    """On real joules of a CPU, 100 layers predict others with less than 14 % mean error, and intervals that hold."""
    data = Path(os.environ.get("EDGE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
    layer_joules = pytest.importorskip("benchmarks.layer_joules")
    if not (data / layer_joules.FOLDER).is_dir():
        pytest.skip(f"no measured layers below {data}: set EDGE_DATA")
    table = next(table for table in layer_joules.layer_tables(data) if table.kind == "conv")
    errors, inside = [], []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(table.joules))
        train, test = order[200:300], order[:200]
        sizes, joules = [table.sizes[row] for row in train], [table.joules[row] for row in train]
        found = fit(table.family, sizes, joules, [0.0] * 100)
        process = Process(table.family, sizes, joules, [0.0] * 100, parameters=found.parameters, spread=found.spread)
        predicted = process.predict([table.sizes[row] for row in test])
        truth = np.array(table.joules)[test]
        errors.append(np.mean(np.abs(np.exp(predicted.mean) / truth - 1)))
        inside.append(np.mean(np.abs(np.log(truth) - predicted.mean) < 1.6449 * predicted.deviation))
    assert np.mean(errors) < 0.14
    assert 0.80 <= np.mean(inside) <= 0.97
