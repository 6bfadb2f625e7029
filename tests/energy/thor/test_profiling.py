"""Profiling a device: drift divides out, the budget holds, what was measured is kept, the command."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import msgspec
import pytest

from energy import cli
from energy.errors import ProfileError
from energy.thor.layers import LayerSpec
from energy.thor.pack import Pack
from energy.thor.profile import Cost, Family, Metered, MeteredLayer, Point, Sensed, load_profile, save_profile
from tests.energy.meter_tools import Power
from tests.energy.probe_packs import dense, dense_pack, write_pack

pytest.importorskip("onnxruntime")
from energy.metering.meter import Meter
from energy.thor import interleave
from energy.thor.anchoring import ARCHITECTURE_SPREAD, anchored, factor_of
from energy.thor.gauge import CpuGauge, MeterGauge
from energy.thor.probing import Reading
from energy.thor.profiling import Profiler, Settings

EXACT = interleave.Limits(0.05, 2, 2)


class Drifting:
    """A machine that gets slower with every burst; a graph costs what its name says, in milliseconds."""

    def __init__(self, drift):
        self.factor, self.drift = 1.0, drift

    def __call__(self, stepper):
        self.factor *= self.drift
        return Reading(1, {"cpu_seconds": stepper * self.factor})


class Quick(CpuGauge):
    """Real steps in very short bursts."""

    window_s = 0.0002


def profiler(path, **changes):
    settings = {"batch": 4, "budget_s": 60.0, "fitted": False, "limits": EXACT, "most": 8}
    return Profiler(Pack(path), Quick(), Settings(**{**settings, **changes}))


def test_drift_of_the_machine_divides_out():
    """A machine that slows down by 1 % with every burst, 5 rounds long: ratios stay within 1 %."""
    gauge = Drifting(1.01)
    anchor = interleave.Anchor(2.0, gauge)
    limits = interleave.Limits(0.0, 5, 5)
    found = interleave.measure({"a": 1.0, "b": 3.0, "c": 7.0}, anchor, gauge, random.Random(1), limits=limits)
    scale = anchor.median("cpu_seconds")
    costs = {name: interleave.cost(ratios["cpu_seconds"], scale) for name, ratios in found.items()}
    assert costs["b"].mean / costs["a"].mean == pytest.approx(3, rel=0.02)
    assert costs["c"].mean / costs["a"].mean == pytest.approx(7, rel=0.02)
    assert costs["a"].repeats == 5
    assert costs["a"].relative_error < 0.01


def test_rounds_end_when_a_graph_is_measured_well_enough():
    """A machine without noise needs the minimum of rounds, a noisy one more, up to the maximum."""
    steady = Drifting(1.0)
    limits = interleave.Limits(0.02, 3, 8)
    found = interleave.measure({"a": 1.0}, interleave.Anchor(1.0, steady), steady, random.Random(0), limits=limits)
    assert len(found["a"]["cpu_seconds"]) == 3
    noise = random.Random(5)

    def noisy(stepper):
        return Reading(1, {"cpu_seconds": stepper * noise.uniform(0.5, 2.0)})

    found = interleave.measure({"a": 1.0}, interleave.Anchor(1.0, noisy), noisy, random.Random(0), limits=limits)
    assert len(found["a"]["cpu_seconds"]) == 8


def test_what_a_run_costs_by_itself_is_no_part_of_the_layer():
    """It is taken off once, and the rest shared by the layers in the graph; never is a cost below zero."""
    assert interleave.cost([1.0, 1.0], 10.0, less=2.0, share=4).mean == pytest.approx(2.0)
    assert interleave.cost([0.1, 0.1], 10.0, less=2.0).mean == pytest.approx(0.1)


def test_every_kind_is_measured_and_layers_first_come(tmp_path):
    """Points of both kinds with their sizes and batch, costs above zero, and the cost of an empty run."""
    running = profiler(dense_pack(tmp_path / "a.probes"))
    counts = list(running.batches())
    assert counts == sorted(counts)
    assert counts[-1] == 16
    families = {family.kind: family for family in running.families()}
    assert {len(family.points) for family in families.values()} == {8}
    sizes = [point.sizes for point in families["linear"].points]
    assert {"batch": 4, "in_channels": 64, "out_channels": 32} in sizes
    # Two rounds at a time, and all of it again two times later.
    assert {point.costs["cpu_seconds"].repeats for family in families.values() for point in family.points} == {6}
    assert all(point.costs["cpu_seconds"].mean > 0 for family in families.values() for point in family.points)
    assert running.fixed()["cpu_seconds"] > 0


def test_layers_can_be_held_out(tmp_path):
    """With candidates only, no layer of the pack's models is measured."""
    running = profiler(dense_pack(tmp_path / "a.probes"), roles=("candidate",))
    list(running.batches())
    sizes = [point.sizes for family in running.families() for point in family.points]
    assert {"batch": 4, "in_channels": 64, "out_channels": 32} not in sizes


def test_the_budget_ends_it(tmp_path):
    """A clock that jumps: one batch at most, and what was measured is there."""
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    settings = Settings(batch=2, budget_s=3.0, fitted=False, limits=EXACT)
    running = Profiler(Pack(dense_pack(tmp_path / "a.probes")), Quick(), settings, clock=clock)
    assert len(list(running.batches())) <= 1


def test_a_budget_too_small_for_the_sensor_is_said(tmp_path):
    """Bursts of 2 s and 5 s to spend: the line names a budget that would do."""

    class Slow(CpuGauge):
        window_s = 2.0

    said = []
    pack = Pack(write_pack(tmp_path / "a.probes", [("empty", "", {}), dense("layer", 64, 32)]))
    settings = Settings(batch=2, budget_s=5.0, fitted=False)
    Profiler(pack, Slow(), settings, say=said.append)
    assert "give --budget-s 36 or more" in said[0]


def test_known_points_are_not_measured_again(tmp_path):
    """Those of an earlier session stay, and their sizes are left alone."""
    point = Point(
        sizes={"batch": 4, "in_channels": 64, "out_channels": 32},
        costs={"cpu_seconds": Cost(mean=1.0, relative_error=0.01)},
    )
    pack = Pack(write_pack(tmp_path / "a.probes", [("empty", "", {}), dense("layer", 64, 32)]))
    known = [Family(kind="linear", points=[point])]
    running = Profiler(pack, Quick(), Settings(batch=4, fitted=False), known=known)
    assert list(running.batches()) == []
    assert running.families() == known


def test_missing_kinds_are_said(tmp_path):
    """A kind that has no probe is in the notes of the profile."""
    pack = dense_pack(tmp_path / "a.probes", missing={"fold": ["net: fold"]})
    assert profiler(pack).notes == ["no probe for fold (net: fold): its cost is missing from estimates"]


def test_a_fixed_batch_must_be_asked_for(tmp_path):
    """A layer that only takes another batch is named, with the cure."""
    pack = write_pack(tmp_path / "a.probes", [("empty", "", {}), dense("layer", 64, 32)])
    probes = [{"file": "p0.onnx", "role": "empty"}, {"file": "p1.onnx", "role": "layer", "kind": "linear", "batch": 16}]
    pack = write_pack(tmp_path / "b.probes", [("empty", "", {}), dense("layer", 64, 32)], probes=probes)
    with pytest.raises(ProfileError, match="profile with --batch 16"):
        profiler(pack)


def test_a_meter_gives_joules(tmp_path):
    """Steps of a machine that draws 5 W cost 5 times their seconds, and pictures get power and windows."""
    meter = Meter([[Power(time.monotonic, lambda _now: 5.0, interval_s=0.001)]])
    gauge = MeterGauge(meter)
    gauge.window_s = 0.03
    settings = Settings(batch=4, fitted=False, limits=EXACT, most=1)
    pack = Pack(write_pack(tmp_path / "a.probes", [("empty", "", {}), dense("layer", 640, 320)]))
    running = Profiler(pack, gauge, settings)
    list(running.batches())
    cost = running.families()[0].points[0].costs
    assert cost["joules"].mean / cost["seconds"].mean == pytest.approx(5.0, rel=0.3)
    assert gauge.power
    assert gauge.marks[0].name == "linear"
    meter.close()


def test_without_a_sensor_there_is_no_metered_gauge():
    """It says so instead of giving zeros."""
    with pytest.raises(ProfileError, match="no sensor of power or energy"):
        MeterGauge(Meter([]))


# The command --------------------------------------------------------------------------------------------------


def command(*arguments):
    return cli.main(["profile", "--sensor", "none", *map(str, arguments)])


def test_the_command_measures_without_scipy(tmp_path, capsys, monkeypatch):
    """--measure-only writes points by CPU time and fits nothing; the batch is the pack's."""
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    pack, output = dense_pack(tmp_path / "a.probes", batch=3), tmp_path / "points.json"
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 1) == 0
    profile = load_profile(output)
    assert profile.quantity == "cpu_seconds"
    assert profile.sensed is None
    assert {point.sizes["batch"] for family in profile.families for point in family.points} == {3}
    assert not any(family.fitted for family in profile.families)
    assert "in CPU seconds" in capsys.readouterr().out
    assert command(pack, "-o", output, "--measure-only") == 2
    assert "--resume" in capsys.readouterr().err
    before = sum(len(family.points) for family in profile.families)
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 1, "--resume") == 0
    assert sum(len(family.points) for family in load_profile(output).families) >= before


def test_the_command_fits_and_predicts(tmp_path, monkeypatch):
    """With SciPy the profile has models, and they estimate the layers it was made for."""
    pytest.importorskip("scipy")
    from energy.thor.estimate import estimate

    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    pack, output = dense_pack(tmp_path / "a.probes"), tmp_path / "profile.json"
    assert command(pack, "-o", output, "--budget-s", 2) == 0
    sizes = {"batch": 32, "in_channels": 64, "out_channels": 32}
    found = estimate(load_profile(output), [LayerSpec("fc", "linear", sizes)])
    assert 0 < found.low < found.total < found.high < 0.1


@pytest.mark.parametrize("options", [["--budget-s", "0"], ["--threads", "0"]])
def test_wrong_options_are_refused(tmp_path, capsys, options):
    """In one line, with exit code 2."""
    assert command(dense_pack(tmp_path / "a.probes"), "-o", tmp_path / "p.json", *options) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_no_bundle_is_no_anchor(tmp_path, capsys):
    """A file that is no bundle is named."""
    pytest.importorskip("scipy")
    (tmp_path / "text").write_text("hello")
    pack = dense_pack(tmp_path / "a.probes")
    assert command(pack, "-o", tmp_path / "p.json", "--anchor", tmp_path / "text") == 1
    assert "is no bundle" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_error_of_a_factor_covers_the_next_architecture(count):
    """Of anchors that spread as architectures do, nine in ten further models lie within the interval, or some more."""
    draws = random.Random(4)
    inside, widest = 0, 0.0
    for _ in range(2000):
        *anchors, other = (draws.gauss(0.1, ARCHITECTURE_SPREAD) for _ in range(count + 1))
        factor, error = factor_of(anchors)
        inside += abs(other - math.log(factor)) <= 1.645 * error
        widest = max(widest, error)
    assert 0.88 <= inside / 2000 <= 0.96
    assert widest < 0.2


def test_anchors_that_disagree_widen_the_error_and_are_noted(tmp_path, monkeypatch):
    """Two anchors far apart: the error grows, but two models do not make it boundless; a note says what to do."""
    factor, error = factor_of([-0.145, 0.088])
    assert factor == pytest.approx(math.exp(-0.0285))
    assert factor_of([0.0, 0.0])[1] < error < 0.2
    pytest.importorskip("scipy")
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    output = tmp_path / "profile.json"
    assert command(dense_pack(tmp_path / "a.probes"), "-o", output, "--budget-s", 2) == 0
    profile = load_profile(output)
    dense = LayerSpec("fc", "linear", {"batch": 32, "in_channels": 64, "out_channels": 32})
    one = with_anchor(profile, dense, 1e-4).metered[0]
    two = msgspec.structs.replace(one, model="other", costs={"cpu_seconds": 1.5e-4})
    noted = anchored(msgspec.structs.replace(profile, metered=[one, two])).notes
    assert any("disagree by 50%" in note for note in noted)


def test_an_anchor_with_other_layers_is_metered_and_corrects_nothing(tmp_path, capsys, monkeypatch):
    """A whole bundle runs, and a note names the kinds that the profile lacks."""
    pytest.importorskip("scipy")
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    bundle = Path(__file__).parents[3] / "examples" / "digits.bundle"
    pack, output = dense_pack(tmp_path / "a.probes"), tmp_path / "profile.json"
    assert command(pack, "-o", output, "--budget-s", 1, "--anchor", bundle) == 0
    assert "digits corrects nothing: this profile knows no" in capsys.readouterr().out
    assert load_profile(output).factor == {}


def with_anchor(profile, layer, cost):
    layers = [MeteredLayer(*layer)]
    anchor = Metered(model="net", batch=32, layers=layers, costs={"cpu_seconds": cost})
    return msgspec.structs.replace(profile, metered=[anchor])


def test_an_anchor_metered_without_scipy_sets_the_factor_at_the_fit(tmp_path, monkeypatch):
    """``--measure-only --anchor`` keeps what the whole model cost, and ``edge-energy fit`` makes the factor of it."""
    pytest.importorskip("scipy")
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    bundle = Path(__file__).parents[3] / "examples" / "digits.bundle"
    output = tmp_path / "profile.json"
    assert (
        command(dense_pack(tmp_path / "a.probes"), "-o", output, "--budget-s", 1, "--measure-only", "--anchor", bundle)
        == 0
    )
    measured = load_profile(output)
    assert measured.factor == {}
    assert measured.metered[0].model == "digits"
    assert measured.metered[0].costs["cpu_seconds"] > 0
    known = [layer for layer in measured.metered[0].layers if layer.kind == "linear"]
    anchor = msgspec.structs.replace(measured.metered[0], layers=known)
    save_profile(msgspec.structs.replace(measured, metered=[anchor]), output)
    assert cli.main(["fit", str(output)]) == 0
    fitted = load_profile(output)
    assert fitted.factor["cpu_seconds"] > 0
    assert fitted.wholes[0].measured == anchor.costs["cpu_seconds"]


def test_points_of_another_sensor_are_not_mixed_in(tmp_path, capsys):
    """``--resume`` refuses a profile whose costs came from another sensor, by its name."""
    pack, output = dense_pack(tmp_path / "a.probes"), tmp_path / "profile.json"
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 1) == 0
    sensed = Sensed(sensor="plug", scope="board", quality="power", covers="everything")
    save_profile(msgspec.structs.replace(load_profile(output), sensed=sensed), output)
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 1, "--resume") == 2
    assert "of sensor 'plug'" in capsys.readouterr().err


def test_kinds_of_another_pack_stay_in_a_resumed_profile(tmp_path):
    """A second pack adds its kinds; those of the first are not lost."""
    output = tmp_path / "profile.json"
    assert command(dense_pack(tmp_path / "a.probes"), "-o", output, "--measure-only", "--budget-s", 1) == 0
    profile = load_profile(output)
    other = msgspec.structs.replace(profile.families[0], kind="conv2d")
    save_profile(msgspec.structs.replace(profile, families=[*profile.families, other]), output)
    again = ["-o", output, "--measure-only", "--budget-s", 1, "--resume"]
    assert command(dense_pack(tmp_path / "b.probes"), *again) == 0
    assert {"conv2d", "linear"} <= {family.kind for family in load_profile(output).families}


def test_anchors_set_the_factor(tmp_path, monkeypatch):
    """Models measured 20 % above their layers: estimates rise by 20 %, and the models are kept as anchors."""
    pytest.importorskip("scipy")
    from energy.thor.estimate import estimate

    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)
    output = tmp_path / "profile.json"
    assert command(dense_pack(tmp_path / "a.probes"), "-o", output, "--budget-s", 2) == 0
    profile = load_profile(output)
    dense = LayerSpec("fc", "linear", {"batch": 32, "in_channels": 64, "out_channels": 32})
    plain = estimate(profile, [dense])
    corrected = anchored(with_anchor(profile, dense, 1.2 * plain.total))
    found = estimate(corrected, [dense])
    assert found.total == pytest.approx(1.2 * plain.total)
    assert found.high / found.low > plain.high / plain.low
    (whole,) = corrected.wholes
    assert whole.anchor
    assert whole.predicted == pytest.approx(plain.total)
    assert anchored(corrected).factor == corrected.factor
    unknown = anchored(with_anchor(profile, LayerSpec("fold", "fold", {"batch": 32}), 1.0))
    assert unknown.factor == {}
    assert "net corrects nothing: this profile knows no fold" in unknown.notes[0]
    assert msgspec.json.decode(msgspec.json.encode(corrected), type=type(corrected)) == corrected
