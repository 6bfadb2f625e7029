"""Simulated runs: the same seed gives the same report anywhere; every fault is survived; what breaks is replayed."""

from __future__ import annotations

import itertools
import json
import shlex
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coordinator.cli import main
from coordinator.executors import open_executor
from coordinator.plan import Downlink, Training, Uplink
from coordinator.scheduling import SELECTORS
from coordinator.scheduling.random import RandomSelector
from coordinator.simulation import DEFAULT_FAULTS, FaultPlan, Settings, as_text, parse_faults, simulate
from coordinator.simulation.data import Data, load_data, share_out
from coordinator.simulation.owner import OwnerLimits
from coordinator.simulation.report import as_progress
from coordinator.simulation.synthetic import synthetic
from coordinator.simulation.traces import LinkTrace, write_traces
from edge_runtime.errors import ConfigError, DataError
from tests.coordinator.simulation import helpers as h
from tests.edge_runtime import toy_bundle

if TYPE_CHECKING:
    from coordinator.simulation import SimulationReport
    from coordinator.simulation.report import Progress


def same(one: SimulationReport, other: SimulationReport) -> bool:
    """All but the time it took here."""
    one.wall_s = other.wall_s = 0.0
    return one == other


def test_the_seed_decides_everything(tmp_path):
    """The same seed gives the same report; another fleet, echo and faults another one."""
    plan = h.plan(tmp_path, over_commit=1.3)
    runs = [simulate(plan, synthetic(40, 1), Settings(seed=seed), faults=DEFAULT_FAULTS) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_training_gives_the_same_wherever_it_runs(tmp_path, kind):
    """In this process, in others and on a Ray cluster: the same report, device by device, bit by bit."""
    np.savez(tmp_path / "test.npz", **np.load(toy_bundle.write_data(tmp_path / "t.npz", 60, seed=5)))
    plan = h.plan(
        tmp_path,
        over_commit=1.3,
        test_set=str(tmp_path / "test.npz"),
        uplink=Uplink(codec="topk", options={"density": 0.3}),
        training=Training(epochs=1, batch_size=8, hyper={"lr": 0.05}, holdout_fraction=0.2),
        retain_updates="all",
    )
    world, shares, settings = synthetic(12, 1), h.shares(tmp_path, 12), Settings(seed=1, device_accuracy=True)
    here = simulate(plan, world, settings, shares=shares)
    if kind == "ray":
        pytest.importorskip("ray", reason='Ray is not installed (pip install "edge-training-runtime[ray]")')
    executor = open_executor(2, "" if kind == "ray" else None)
    try:
        there = simulate(plan, world, settings, shares=shares, executor=executor)
    finally:
        executor.close()
    assert same(here, there)
    assert here.verified_versions == 4
    assert here.versions[-1].accuracy > here.versions[0].accuracy
    assert all(device.final_accuracy is not None for device in here.device_reports)


MODES = {
    "synchronous": {"over_commit": 1.3},
    "buffered": {"mode": "buffered", "concurrency": 8},
    "anarchic": {"mode": "anarchic"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_no_fault_loses_or_doubles_an_update(tmp_path, mode, seed):
    """Crashes, a lost broker, repeats and wrong clocks: the run ends well, every version can be made again."""
    plan = h.plan(tmp_path, rounds=8, retain_updates="all", attempts=50, **MODES[mode])
    faults = FaultPlan(broker=2, coordinator=6, clock=2, agents=0.1, workers=0.1, duplicates=0.2)
    report = simulate(plan, synthetic(30, seed, charging=True), Settings(seed=seed, keep_reserve=True), faults=faults)
    assert report.status == "finished", report.reason
    assert report.verified_versions == 8
    assert report.faults["coordinator"] + report.faults["clock"] >= 4
    assert "every update had one verdict" in as_text(report)


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_twice_counts_once(tmp_path, seed):
    """Every message comes again, late, and connections break: bytes of a pull that was long answered do no harm."""
    plan = h.plan(tmp_path, rounds=8, retain_updates="all", mode="anarchic", interval_s=5.0, max_staleness=2)
    settings = Settings(seed=seed, leaving="continues", step_s=1.0)
    report = simulate(plan, synthetic(30, seed), settings, faults=FaultPlan(broker=8, duplicates=1.0))
    assert report.status == "finished", report.reason
    assert report.verified_versions == 8


def test_training_survives_faults_with_what_codecs_hold_back(tmp_path):
    """Refused updates go back into the residual, agents that crashed train again; the models can be made again."""
    plan = h.plan(
        tmp_path,
        rounds=6,
        over_commit=1.5,
        retain_updates="all",
        uplink=Uplink(codec="topk", options={"density": 0.3}),
        downlink=Downlink(),
        training=Training(steps=1, batch_size=8, hyper={"lr": 0.05}),
    )
    report = simulate(plan, synthetic(12, 1), Settings(seed=2), shares=h.shares(tmp_path, 12), faults=DEFAULT_FAULTS)
    assert report.status == "finished", report.reason
    assert report.verified_versions == 6


def test_a_thousand_devices_take_seconds(tmp_path):
    """Without training a large fleet is a matter of seconds, and the work is spread."""
    plan = h.plan(tmp_path, rounds=10, target=50, over_commit=1.3)
    report = simulate(plan, synthetic(1000, 1), Settings())
    assert report.status == "finished"
    assert report.trained >= 500
    assert sum(device.counted > 0 for device in report.device_reports) > 300


@pytest.mark.parametrize(
    ("trace", "spans"),
    [
        ({"battery_wh": 0.0005, "idle_watts": 1.0}, ([(0.0, 100_000.0)], [])),
        ({}, ([], [])),
        ({"battery_wh": 1.0, "battery_percent": 0.0, "charge_watts": 5.0}, ([(0.0, 100_000.0)], [])),
    ],
)
def test_a_run_that_nobody_can_take_part_in_any_more_stalls(tmp_path, capsys, trace, spans):
    """Empty batteries that are never charged, or nobody ever online: the command says so, fails, and is replayed."""
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    write_traces(h.traces(*(h.device(f"d{n}", **{"presence": "own", **trace}) for n in range(4)), own=spans), tmp_path)
    (tmp_path / "plan.toml").write_text(
        'name = "toy"\nbundle = "toy.bundle"\ndataset = "d"\nrounds = 1000\n[participation]\ntarget = 2\n'
        '[training]\nsteps = 2\n[uplink]\ncodec = "raw"\n[downlink]\ncodec = "raw"\n'
    )
    command = ["simulate", str(tmp_path / "plan.toml"), "--traces", str(tmp_path), "--no-training"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "toy-1 stalled: no device will ever be there again" in said
    assert said.splitlines()[-1].startswith("replay: edge-coordinator simulate")


def test_a_run_without_progress_stalls(tmp_path):
    """Devices that are there and decline every job: after 30 days without a version, and not before a limit."""
    limits = OwnerLimits(only_when_charging=True)
    world = h.traces(h.device(limits=limits, battery_wh=1e6))
    stalled = simulate(h.plan(tmp_path, target=1), world, Settings(tick_s=3600.0))
    assert (stalled.status, round(stalled.virtual_s / 86_400)) == ("stalled", 30)
    assert "--limit-hours" in stalled.reason
    assert simulate(h.plan(tmp_path, target=1), world, Settings(limit_s=600.0)).status == "stopped"


def test_joules_of_jobs_that_count_are_not_wasted(tmp_path):
    """What a counted job draws until its device has the verdict is its own, and what was never used is wasted."""
    plan = h.plan(tmp_path, rounds=3, target=4)
    devices = [h.device(f"d{n}", training_watts=2.0, idle_watts=1.0, radio_joules_per_mb_up=1e4) for n in range(4)]
    slow = LinkTrace(name="fast", times_s=[0.0], up_kbit_s=[1e3], down_kbit_s=[1e3], period_s=60.0, round_trip_s=2.0)
    world = h.traces(*devices)
    world.links["fast"] = slow
    report = simulate(plan, world, Settings())
    assert report.outcomes == {"counted": 12}
    assert report.modelled_joules.idle_wait > 0.0
    assert report.modelled_joules.radio > 0.0
    assert report.wasted_fraction == 0.0
    assert all(job.outcome == "counted" for job in report.assignments)


def test_work_that_goes_on_at_the_end_is_charged(tmp_path):
    """A run that is over while devices train: what they drew until then is in its joules, and wasted."""
    world = h.traces(*(h.device(f"d{n}", training_watts=2.0, idle_watts=1.0) for n in range(4)))
    report = simulate(h.plan(tmp_path), world, Settings(step_s=100.0, limit_s=50.0))
    assert report.modelled_joules.training == pytest.approx(4 * 2.0 * 50.0, rel=0.01)
    assert report.modelled_joules.idle_wait == pytest.approx(4 * 1.0 * 50.0, rel=0.01)
    assert report.wasted_fraction == pytest.approx(1.0)


def test_an_agent_dies_once_in_a_job(tmp_path):
    """Deaths in every job: each comes once, then the job is done again, so the run ends."""
    world = h.traces(*(h.device(f"d{n}") for n in range(6)))
    report = simulate(h.plan(tmp_path), world, Settings(), faults=FaultPlan(agents=1.0))
    assert report.status == "finished", report.reason
    assert report.faults["agents"] <= sum(report.outcomes.values())


def test_a_long_run_says_how_far_it_is(tmp_path, monkeypatch):
    """While it simulates: virtual time and versions so far, never backwards."""
    monkeypatch.setattr("coordinator.simulation.world.PROGRESS_S", 0.0)
    told: list[Progress] = []
    report = simulate(h.plan(tmp_path), synthetic(20, 1), Settings(), on_progress=told.append)
    assert [one.version for one in told] == sorted(one.version for one in told)
    assert 0 <= told[-1].virtual_s <= report.virtual_s
    assert f"version {told[-1].version}, " in as_progress(told[-1])


def test_a_table_that_leaves_versions_out_says_so(tmp_path):
    """Every third of 31 versions: the table says so, and what its counts are of."""
    report = simulate(h.plan(tmp_path, rounds=30, target=2), synthetic(20, 1), Settings(step_s=1.0))
    text = as_text(report)
    assert "(every 3rd of 31 versions; updates and late are of that version alone" in text
    assert "a step of the reference device: 1000 ms (given)" in text
    assert "every 1" not in as_text(report, rows=31)


def test_a_run_ends_when_its_caller_has_enough_or_time_is_up(tmp_path):
    """At a version that the caller is told of, or at the limit of virtual time, with all that was reached."""
    plan, world = h.plan(tmp_path, rounds=100), synthetic(20, 1)
    enough = simulate(plan, world, Settings(), on_version=lambda version: version.version == 3)
    assert (enough.status, enough.versions[-1].version) == ("stopped", 3)
    late = simulate(plan, world, Settings(limit_s=5.0))
    assert late.status == "stopped"
    assert "5 s is over" in late.reason
    assert late.virtual_s == 5.0


@pytest.mark.parametrize(
    ("how", "check"),
    [
        ("iid", lambda y, parts: min(len(set(y[part])) for part in parts) == 3),
        ("dirichlet:0.05", lambda y, parts: min(len(set(y[part])) for part in parts) < 3),
        ("groups", lambda _y, parts: all(len({row // 10 for row in part}) == 3 for part in parts)),
    ],
)
def test_data_is_shared_out(tmp_path, how, check):
    """No sample goes to two devices; labels are even, skewed, or groups are whole."""
    with np.load(toy_bundle.write_data(tmp_path / "all.npz", 300)) as file:
        data = Data(file["x"], file["y"], np.arange(300) // 10)
    shares = share_out(data, how, 10, seed=1)
    parts = [shares.of(number).tolist() for number in range(10)]
    rows = list(itertools.chain(*parts))
    assert len(rows) == len(set(rows))
    assert all(parts)
    assert check(data.y, parts)


def test_wrong_wishes_are_refused(tmp_path):
    """Unknown faults and partitions, and too little data, are named with the cure."""
    with pytest.raises(ConfigError, match="write default, or NAME=NUMBER"):
        parse_faults("meteorites=1")
    with pytest.raises(ConfigError, match=r"--faults agents=5: write a share from 0 to 1, as agents=0.05"):
        parse_faults("agents=5")
    with pytest.raises(ConfigError, match=r"--faults clock=0.5: write how many times, a whole number"):
        parse_faults("clock=0.5")
    script = tmp_path / "make_data.py"
    script.write_text("print(1)")
    with pytest.raises(DataError, match=r"make_data.py: is no .npz file; write one with numpy.savez"):
        load_data(script)
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object), y=np.zeros(2))
    with pytest.raises(DataError, match="must be arrays of numbers"):
        load_data(tmp_path / "objects.npz")
    with pytest.raises(DataError, match="No such file"):
        load_data(tmp_path / "none.npz")
    data = h.shares(tmp_path, 2).data
    with pytest.raises(ConfigError, match="there are: iid, dirichlet:ALPHA, groups"):
        share_out(data, "fair", 2)
    with pytest.raises(ConfigError, match="give more data"):
        share_out(data, "iid", 100_000)


class Faulty(RandomSelector):
    """Breaks down sooner or later, by the seed of the selection."""

    @classmethod
    def from_options(cls, options):
        return cls() if not options else super().from_options(options)

    def select(self, now, fleet, request):
        if request.round > 1 and request.random.random() < 0.5:
            raise RuntimeError(f"the selector lost its way in round {request.round}")
        return super().select(now, fleet, request)


def test_what_breaks_is_replayed_by_one_command(tmp_path, monkeypatch, capsys):
    """A plug-in that raises: the command line prints what happened and a command that makes it happen again."""
    monkeypatch.setitem(SELECTORS._builtin, "faulty", Faulty.from_options)
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "toy"\nbundle = "toy.bundle"\ndataset = "d"\nrounds = 30\n[participation]\ntarget = 3\n'
        'selector = "faulty"\n[training]\nsteps = 2\n[uplink]\ncodec = "raw"\n[downlink]\ncodec = "raw"\n'
    )
    command = ["simulate", str(plan), "--devices", "20", "--no-training", "--faults", "default", "--seed", "4"]
    assert main([*command, "--processes", "1"]) == 1
    said = capsys.readouterr().err
    broke, replay = said.strip().splitlines()[-2:]
    assert "the selector lost its way in round" in broke
    again = shlex.split(replay.removeprefix("replay: edge-coordinator "))
    assert "--seed" in again
    assert main([*again, "--processes", "1"]) == 1
    assert broke in capsys.readouterr().err


def test_a_run_that_failed_is_replayed_by_one_command(tmp_path, capsys):
    """A round that nobody answers ends the run as failed; the command to see it again comes with the report."""
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "toy"\nbundle = "toy.bundle"\ndataset = "d"\nrounds = 3\n[participation]\ntarget = 3\nattempts = 1\n'
        'deadline_s = 1.0\n[training]\nsteps = 2\n[uplink]\ncodec = "raw"\n[downlink]\ncodec = "raw"\n'
    )
    command = ["simulate", str(plan), "--devices", "20", "--no-training", "--seed", "4", "--step-ms", "60000"]
    assert main(command) == 1
    said = capsys.readouterr().out.splitlines()
    assert any("toy-1 failed" in line for line in said)
    again = shlex.split(said[-1].removeprefix("replay: edge-coordinator "))
    assert again[:2] == ["simulate", str(plan)]
    assert main(again) == 1
    repeated = capsys.readouterr().out.splitlines()
    times = ("s here", " a second")  # of this machine
    assert [line for line in repeated if not line.endswith(times)] == [
        line for line in said if not line.endswith(times)
    ]


def test_the_command_reports_as_text_and_json(tmp_path, capsys):
    """The same plan file as production; a table for people, one object for programs."""
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    toy_bundle.write_data(tmp_path / "train.npz", 200)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "toy"\nbundle = "toy.bundle"\ndataset = "d"\nrounds = 3\ntest_set = "train.npz"\n[participation]\n'
        'target = 3\n[training]\nepochs = 1\nhyper = {lr = 0.05}\n[uplink]\ncodec = "raw"\n[downlink]\ncodec = "raw"\n'
    )
    command = ["simulate", str(plan), "--devices", "10", "--data", str(tmp_path / "train.npz"), "--processes", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "toy-1 finished" in said
    assert "from the device model" in said
    assert "(measured)" in said
    step_ms = said.split("--step-ms ")[1].split()[0]
    assert float(step_ms) == float(f"{float(step_ms):.2g}")
    assert f"a step of the reference device: {float(step_ms):.3g} ms (measured)" in said
    again = shlex.split(said.splitlines()[-1].removeprefix("replay: edge-coordinator "))
    assert main([*again, "--processes", "1"]) == 0
    table = said.split(" finished after")[0]
    assert capsys.readouterr().out.startswith(table)
    assert main([*command, "--json", "--step-ms", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [version["version"] for version in found["versions"]] == [0, 1, 2, 3]
    assert found["assignments"][0] | {"device": "", "assignment": ""} == {
        "round": 0,
        "device": "",
        "steps": None,
        "role": "trainer",
        "version": 0,
        "assignment": "",
        "sequence": 0,
        "outcome": "counted",
    }
    assert found["step_s"] == 0.003
    assert found["replay"].startswith("edge-coordinator simulate")
    assert main(["simulate", str(plan), "--devices", "10"]) == 2
    assert "--no-training" in capsys.readouterr().err
    assert main(["simulate", str(plan), "--devices", "10", "--no-training", "--partition", "dirichlet:1"]) == 2
    assert "--partition is for --data; leave it out with --no-training" in capsys.readouterr().err
    assert main([*command, "--device-accuracy"]) == 0
    assert "on the data of every device: accuracy" in capsys.readouterr().out
