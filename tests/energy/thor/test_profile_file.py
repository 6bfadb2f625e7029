"""The profile's file: what is written can be read again, and modelled figures have names of their own."""

from __future__ import annotations

import json
import math
import random

import msgspec
import pytest

np = pytest.importorskip("numpy")

from energy.errors import ProfileError  # noqa: E402
from energy.thor import interleave  # noqa: E402
from energy.thor.kinds import Kind, Measured  # noqa: E402
from energy.thor.pack import Probe  # noqa: E402
from energy.thor.probing import Reading  # noqa: E402
from energy.thor.profile import (  # noqa: E402
    Cost,
    Device,
    Family,
    Point,
    Profile,
    Sample,
    Sensed,
    Whole,
    load_profile,
    save_profile,
)

MODELLED = Sensed(sensor="modelled", scope="modelled", quality="modelled", covers="CPU load")
MEASURED = Sensed(sensor="jetson", scope="module", quality="power", covers="VDD_IN")


def made(quantity="joules", **changes):
    points = [Point(sizes={"batch": 4}, costs={quantity: Cost(mean=0.5, relative_error=0.01)})]
    values = {"families": [Family(kind="relu", points=points)], "fixed": {}, "idle_watts": 3.5}
    values["power"] = [Sample(at_s=1.0, watts=5.0)]
    return Profile(**{"device": Device(name="d", board="", cpu=""), "quantity": quantity, **values, **changes})


@pytest.mark.parametrize(
    "profile",
    [made("modelled_joules", sensed=MODELLED), made("modelled_joules"), made("cpu_seconds", sensed=MODELLED)],
)
def test_modelled_power_has_another_name_in_the_file(tmp_path, profile):
    """``power`` and ``idle_watts`` are measured ones; the profile in memory is the same either way."""
    path = tmp_path / "p.json"
    save_profile(profile, path)
    raw = json.loads(path.read_text())
    assert not {"power", "idle_watts"} & set(raw)
    assert (raw["modelled_power"], raw["idle_modelled_watts"]) == ([[1.0, 5.0]], 3.5)
    assert load_profile(path) == profile


def test_measured_power_keeps_its_name_and_earlier_files_are_read(tmp_path):
    """Of a sensor that measures; and a modelled profile of before that knew only these names."""
    path = tmp_path / "p.json"
    save_profile(made(sensed=MEASURED), path)
    raw = json.loads(path.read_text())
    assert (raw["power"], raw["idle_watts"]) == ([[1.0, 5.0]], 3.5)
    assert not {"modelled_power", "idle_modelled_watts"} & set(raw)
    assert load_profile(path) == made(sensed=MEASURED)
    earlier = made("modelled_joules", sensed=MODELLED)
    path.write_bytes(msgspec.json.encode(earlier))
    assert load_profile(path) == earlier


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"idle_watts": math.nan}, "idle_watts"),
        ({"factor": {"joules": math.inf}}, "factor.joules"),
        ({"fixed": {"joules": -1.0}}, "fixed"),
        ({"power": [Sample(at_s=0.0, watts=math.inf)]}, "power.0.1"),
        (
            {"wholes": [Whole(model="m", quantity="joules", batch=1, measured=1, predicted=1, low=1, high=math.inf)]},
            "high",
        ),
    ],
)
def test_numbers_that_could_not_be_read_again_leave_a_good_file_alone(tmp_path, changes, place):
    """Nothing is written, and which number it was is said."""
    path = tmp_path / "p.json"
    save_profile(made(), path)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=place):
        save_profile(made(**changes), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_metered_but_once_is_left_out(tmp_path):
    """A doubtful reading leaves one good ratio of joules, which has no error: seconds stay, and the profile loads."""
    anchor = interleave.Anchor(None, lambda _: Reading(1, {"joules": 2.0, "seconds": 0.1}))
    anchor.take()
    probe = Probe(file="a.onnx", role="layer", kind="relu", sizes={"in_positions": 8})
    kind = Kind("relu", [probe], [], 4, [])
    kind.done.append(Measured(probe, {"batch": 4}, {"joules": [1.0], "seconds": [1.0, 1.02]}))
    points = kind.points(anchor, {})
    assert [set(point.costs) for point in points] == [{"seconds"}]
    kind.done = [Measured(probe, {"batch": 4}, {"joules": [1.0]})]
    assert kind.points(anchor, {}) == []
    save_profile(made(families=[Family(kind="relu", points=points)]), tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json").families[0].points == points


def test_a_counter_that_did_not_move_is_no_cost():
    """Zero joules of a burst, or of the anchor around it, give no ratio; other quantities go on."""
    costs = iter([(0.0, 1.0), (2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0)])

    def gauge(_stepper):
        joules, seconds = next(costs)
        return Reading(1, {"joules": joules, "seconds": seconds})

    found = interleave.measure(
        {"a": None}, interleave.Anchor(None, gauge), gauge, random.Random(0), limits=interleave.Limits(0.0, 2, 2)
    )
    assert found == {"a": {"seconds": [1.0, 1.0]}}
