"""Whole models from a profile, with intervals."""

from __future__ import annotations

import json
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

np = pytest.importorskip("numpy")

from energy.cli import main  # noqa: E402
from energy.errors import ProfileError  # noqa: E402
from energy.thor.estimate import Estimator, estimate  # noqa: E402
from energy.thor.layers import LayerSpec  # noqa: E402
from energy.thor.profile import save_profile  # noqa: E402
from tests.energy.synthetic_layers import cost, draw, profile  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

ROWS = draw(np.random.default_rng(0), 60)
PROFILE = profile(ROWS, [cost(row) for row in ROWS])
LAYERS = [LayerSpec(f"layer{place}", "conv2d", row) for place, row in enumerate(ROWS[:5])]


def test_layers_and_fixed_cost_add_up_to_the_total() -> None:
    """The parts make the whole, calls included, and the interval holds it."""
    layers = [*LAYERS[:-1], LAYERS[-1]._replace(calls=3)]
    found = estimate(PROFILE, layers)
    assert found.quantity == "joules"
    assert [layer.name for layer in found.layers] == [layer.name for layer in layers]
    assert found.total == pytest.approx(found.fixed + sum(layer.mean for layer in found.layers))
    assert found.layers[-1].mean == pytest.approx(3 * estimate(PROFILE, LAYERS).layers[-1].mean)
    assert found.low < found.total < found.high
    truth = 0.001 + sum(layer.calls * cost(layer.sizes) for layer in layers)
    assert found.total == pytest.approx(truth, rel=0.2)


def test_what_layers_share_does_not_average_out() -> None:
    """The same layer ten times is as uncertain as once; ten different ones are relatively less uncertain."""
    once, same = estimate(PROFILE, LAYERS[:1]), estimate(PROFILE, LAYERS[:1] * 10)
    others = [LayerSpec(str(place), "conv2d", row) for place, row in enumerate(ROWS[:10])]
    assert _width(same) == pytest.approx(_width(once), rel=0.01)
    assert _width(estimate(PROFILE, others)) < 0.8 * _width(once)


def _width(found: Any) -> float:
    return float((found.high - found.low) / (found.total - found.fixed))


def test_far_from_what_was_profiled_the_point_stays_in_its_interval() -> None:
    """A model that is unsure beyond measure gives a wide interval around its point, marked, and warns of nothing."""
    (family,) = PROFILE.families
    unsure = msgspec.structs.replace(family.fitted["joules"], spread=1000.0)
    damaged = msgspec.structs.replace(PROFILE, families=[msgspec.structs.replace(family, fitted={"joules": unsure})])
    far = LayerSpec("far", "conv2d", {**ROWS[0], "batch": 10**9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (PROFILE, damaged):
            found = estimate(known, [far])
            assert found.layers[0].extrapolated
            assert 0 < found.low < found.total < found.high < 100 * found.low


def test_factor_corrects_and_its_error_widens() -> None:
    """An anchor's factor scales everything; its error is in every interval."""
    plain = estimate(PROFILE, LAYERS)
    sure = estimate(profile(ROWS, [cost(row) for row in ROWS], factor={"joules": 1.2}), LAYERS)
    unsure = estimate(
        profile(ROWS, [cost(row) for row in ROWS], factor={"joules": 1.2}, factor_error={"joules": 0.2}), LAYERS
    )
    assert sure.total == pytest.approx(1.2 * plain.total)
    assert unsure.total == pytest.approx(sure.total)
    assert unsure.high - unsure.low > 2 * (sure.high - sure.low)


def test_interval_of_a_sum_covers_what_it_promises() -> None:
    """Models drawn from the very process that the profile holds lie within the interval about 90 times of 100."""
    estimator = Estimator(PROFILE)
    process = estimator._known["conv2d"].process
    rows = draw(np.random.default_rng(7), 8)
    mean, covariance = process.posterior(rows)
    covariance = covariance + np.diag(process.noise_variance(mean))
    totals = np.exp(np.random.default_rng(8).multivariate_normal(mean, covariance, 4000)).sum(axis=1) + 0.001
    found = estimator.estimate([LayerSpec("", "conv2d", row) for row in rows])
    assert 0.87 <= np.mean((found.low <= totals) & (totals <= found.high)) <= 0.93
    assert totals.mean() == pytest.approx(found.total, rel=0.01)


def test_sizes_beyond_the_profile_are_marked() -> None:
    """A layer far outside of what was measured says so, others do not."""
    far = LayerSpec("far", "conv2d", {**ROWS[0], "batch": 100_000})
    assert [layer.extrapolated for layer in estimate(PROFILE, [LAYERS[0], far]).layers] == [False, True]


def test_kinds_that_were_never_profiled_are_named() -> None:
    """They are refused with the cure, or left out on request, with their share of the work."""
    layers = [LAYERS[0], LayerSpec("head", "linear", {"batch": 32, "in_channels": 64, "out_channels": 10})]
    with pytest.raises(ProfileError, match="knows no linear; profile the device"):
        estimate(PROFILE, layers)
    found = estimate(PROFILE, layers, allow_missing=True)
    assert found.missing == ("linear",)
    assert 0 < found.missing_share < 1
    assert [layer.name for layer in found.layers] == ["layer0"]


def test_quantity_that_was_not_fitted_is_refused() -> None:
    """No joules are made up from another quantity."""
    with pytest.raises(ProfileError, match="no fitted model of seconds"):
        estimate(PROFILE, LAYERS, "seconds")


MANIFEST = {
    "name": "tiny",
    "layers": [
        {
            "name": "conv",
            "kind": "Conv2d",
            "input_shape": [16, 16, 16],
            "output_shape": [32, 14, 14],
            "settings": {"kernel_size": [3, 3], "stride": [1, 1], "bias": 0},
            "input_gradient": True,
        }
    ],
    "parameters": [],
    "optimizer": {"name": "sgd"},
    "batch": {"mode": "dynamic"},
}


@pytest.mark.parametrize("packed", [True, False])
def test_predict_command_reads_bundles_and_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, packed: bool
) -> None:
    """``edge-energy predict`` prints a table, or JSON whose keys say that joules are predicted."""
    bundle = tmp_path / "tiny.bundle"
    if packed:
        with zipfile.ZipFile(bundle, "w") as archive:
            archive.writestr("manifest.json", json.dumps(MANIFEST))
    else:
        bundle.mkdir()
        (bundle / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    save_profile(PROFILE, tmp_path / "profile.json")
    command = ["predict", str(tmp_path / "profile.json"), str(bundle), "--batch", "16"]
    assert main(command) == 0
    assert "90 % interval" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"][0]
    assert found["low_joules"] < found["predicted_joules"] < found["high_joules"]
    assert "joules" not in found
    assert found["layers"][0]["kind"] == "conv2d"


def test_predict_command_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file and the cure."""
    save_profile(PROFILE, tmp_path / "profile.json")
    other = tmp_path / "notes.txt"
    other.write_text("hello", encoding="utf-8")
    assert main(["predict", str(tmp_path / "profile.json"), str(other)]) == 1
    assert "is no bundle" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "profile.json"), str(tmp_path / "nowhere")]) == 1
    assert main(["predict", str(tmp_path / "profile.json"), str(other), "--batch", "0"]) == 2
