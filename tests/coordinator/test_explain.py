"""``edge-coordinator explain``: why each device was chosen or not, and what became of it."""

from __future__ import annotations

import json

import pytest

from coordinator import cli
from coordinator import events as e
from coordinator.explain import explanation, explanation_lines
from coordinator.plan import Training
from coordinator.rounds import step
from coordinator.store import Store
from edge_runtime.errors import ConfigError
from edge_runtime.messages import Heartbeat
from tests.coordinator import helpers as h


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path, synchronous="OFF")
    yield made
    made.close()


class Played:
    """A run whose steps are stored."""

    def __init__(self, store, plan, *names, **abilities):
        self.store, self.plan = store, plan
        self.state = h.start(plan, now=1_000_000.0)
        self.run = self.state.run.run = store.submit(plan, self.state.run)
        self.fleet = h.fleet()
        for name in names:
            self.fleet.announce(0.0, h.device(name, **abilities))

    def step(self, event):
        effects = step(self.state, event, self.fleet)
        for save in h.of(e.Save, effects):
            self.store.save(save.rows)
        return effects


@pytest.fixture
def played(store):
    """Three of six asked: one counted, one failed and was replaced, one declined; one offline, one unwilling."""
    run = Played(store, h.plan(target=3, minimum=1, rounds=3), *"abcdef")
    run.fleet.announce(0.0, h.device("e", online=False))
    run.fleet.measured(1_000_000.0, "f", Heartbeat(declines=1))
    jobs = h.jobs(run.step(e.Tick(1_000_000.0)))
    assert len(jobs) == 3
    failing, declining, good = jobs
    run.step(e.JobReported(1_000_001.0, failing.device, failing.assignment, "out of memory"))
    run.step(
        e.JobReported(1_000_002.0, declining.device, declining.assignment, "at night", rejected=True, declined_s=900.0)
    )
    run.step(h.arrived(good, 1_000_003.0))
    run.names = {"failing": failing.device, "declining": declining.device, "good": good.device}
    return run


def by_device(entry):
    return {row["device"]: row for row in entry["devices"]}


def test_every_device_has_its_reason(played):
    """Chosen ones with work and outcome, others with what kept them: offline, their owner's limits, the draw."""
    first, *others = explanation(played.store, played.run, 0)
    rows = by_device(first)
    names = played.names
    assert sorted(rows) == list("abcdef")
    assert [rows[names[key]]["chosen"] for key in ("good", "failing", "declining")] == [True, True, True]
    assert rows[names["good"]]["became"] == "delivered"
    assert rows[names["failing"]]["became"] == "failed: out of memory"
    assert rows[names["declining"]]["became"] == "declined: at night"
    assert (rows[names["good"]]["epochs"], rows[names["good"]]["deadline_s"]) == (1, 100.0)
    assert rows["e"]["why"] == "offline"
    assert "limits" in rows["f"]["why"]
    assert "chance" in rows[names["good"]]["figures"]
    assert not rows["f"]["chosen"]
    assert rows["f"]["became"] is None
    assert [entry["attempt"] for entry in others] == [0] * len(others)
    assert others, "the replacement is a selection of its own"
    busy = by_device(others[0])[names["failing"]]["why"]
    assert busy.startswith("failed 1 time in a row, left alone for another")


def test_what_became_follows_the_run(played):
    """Counted once the model is made; a late update says how late; a refused one why."""
    late = next(row for row in played.state.assignments.values() if row.status == "open")
    played.step(e.Tick(1_000_200.0))
    played.step(e.Aggregated(1_000_201.0, 0, h.blob(20)))
    rows = by_device(explanation(played.store, played.run, 0)[0])
    assert rows[played.names["good"]]["became"] == "counted"
    told = explanation(played.store, played.run, 0, late.device)
    assert [row["became"] for entry in told for row in entry["devices"] if row["chosen"]] == ["at work"]
    played.step(h.arrived(late, 1_000_202.0))
    told = explanation(played.store, played.run, 0, late.device)
    became = [row["became"] for entry in told for row in entry["devices"] if row["chosen"]]
    assert became == ["delivered, 1 version late, in round 2"]


def test_what_became_is_told_though_the_clock_was_set_back(played):
    """The times of open jobs move with the clock; what was chosen keeps its job."""
    late = next(row for row in played.state.assignments.values() if row.status == "open")
    played.step(e.Tick(1_000_010.0))
    played.step(e.Tick(500_000.0))
    assert late.assigned_unix_s < 600_000.0
    told = explanation(played.store, played.run, 0, late.device)
    (chosen,) = [row for entry in told for row in entry["devices"] if row["chosen"]]
    assert (chosen["assignment"], chosen["became"]) == (late.assignment, "at work")


def test_one_table_one_line_per_device(played, capsys, tmp_path):
    """With a line before each selection, and the selector's figures as columns."""
    assert cli.main(["explain", played.run, "1", "--state", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    told = explanation(played.store, played.run, 0)
    assert out == explanation_lines(told, played.run)
    assert out[-1].startswith("~ what the selector estimated")
    assert out[0].startswith(f"{played.run}, round 1, attempt 1, selection 1 (")
    assert out[0].endswith("3 of 6 devices chosen")
    assert out[1].split() == ["device", "chosen", "why", "role", "steps", "deadline", "became", "~chance"]
    line = next(line for line in out if line.startswith(played.names["good"]))
    assert "1 epoch" in line
    assert len([line for line in out if line.startswith("e ")]) == len(told)


def test_json_and_one_device(played, capsys, tmp_path):
    """The same for programs, of one device only."""
    assert cli.main(["explain", played.run, "1", "--json", "--device", "e", "--state", str(tmp_path)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["run"] == played.run
    assert {row["device"] for entry in value["selections"] for row in entry["devices"]} == {"e"}
    assert value["selections"][0]["round"] == 0


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        (["nothing-1", "1"], (3, "no run is called 'nothing-1'")),
        (["test-1", "2"], (2, "round 2: has not begun; the run is at round 1")),
        (["test-1", "4"], (2, "has rounds 1 to 3, not 4")),
        (["test-1", "1", "--device", "z"], (2, "no device 'z' was known")),
    ],
)
def test_errors_say_what_there_is(played, capsys, tmp_path, arguments, ends):
    """One line: an unknown run, a round that is not there yet, or never will be, an unknown device."""
    code, message = ends
    assert played.run == "test-1"
    assert cli.main(["explain", *arguments, "--state", str(tmp_path)]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_reports_that_are_gone_are_told(store):
    """Waiting for devices, stopped before it began, and too long ago are different things."""
    run = Played(store, h.plan(target=2, rounds=300), "a")
    with pytest.raises(ConfigError, match="nobody was asked yet; edge-coordinator status"):
        explanation(store, run.run, 0)
    run.state.run.round = 200
    store.save([run.state.run])
    with pytest.raises(ConfigError, match="no longer kept; those of the last 100 rounds are"):
        explanation(store, run.run, 100)
    with pytest.raises(ConfigError, match="nobody was asked in it"):
        explanation(store, run.run, 101)
    run.step(e.StopRequested(2_000_000.0))
    with pytest.raises(ConfigError, match="never began; the run is stopped"):
        explanation(store, run.run, 200)


def test_standing_assignments_are_explained(store):
    """A device that holds one is not chosen again, and says so."""
    plan = h.plan(mode="anarchic", target=2, training=Training(steps=5))
    run = Played(store, plan, "a", abilities=["standing"])
    run.step(e.Tick(1_000_000.0))
    run.fleet.announce(1.0, h.device("b", abilities=["standing"]))
    run.fleet.announce(1.0, h.device("c"))
    run.step(e.DeviceJoined(1_000_001.0, "b"))
    rows = [by_device(entry) for entry in explanation(store, run.run, 0)]
    last = rows[-1]
    assert last["b"]["chosen"]
    assert last["a"]["why"] == "holds a standing assignment"
    assert last["c"]["why"] == "lacks ability 'standing'; update its agent"
    assert last["b"]["became"] == "holds a standing assignment"
    standing = next(row for row in run.state.assignments.values() if row.device == "b")
    run.step(e.Pulled(1_000_002.0, "b", standing.assignment, 0, 3))
    last = by_device(explanation(store, run.run, 0)[-1])
    assert last["b"]["became"] == "holds a standing assignment, pulled 1 time"
    plan_ends = run.state.run
    plan_ends.round = 2
    store.save([plan_ends])
    with pytest.raises(ConfigError, match="2 devices chosen before decide themselves when they train, and its updates"):
        explanation(store, run.run, 2)


def test_a_table_that_is_too_wide_becomes_paragraphs(played):
    """One per device, with what is known of it."""
    told = explanation(played.store, played.run, 0)
    lines = explanation_lines(told, played.run, 60)
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{played.names['good']} chosen: "))
    assert "    steps 1 epoch" in lines[at:]
    assert "    became delivered" in lines[at:]
    assert "e not chosen: offline" in lines
    assert explanation_lines(told, played.run, 1000) == explanation_lines(told, played.run)
