"""The energy ledger: every job has its row, measured and modelled stay apart, and a lie poisons no sum."""

from __future__ import annotations

import json

import pytest

from coordinator import cli
from coordinator import events as e
from coordinator.fleet import SOURCES_KEPT
from coordinator.job_message import make_job
from coordinator.ledger import LARGEST_WATTS, NO_UPDATE, LedgerRow
from coordinator.plan import Training, load_plan
from coordinator.report import device_report, run_ledger, run_summary
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.status_page import page
from coordinator.store import Store
from coordinator.wording import energy_words, joules, source_words
from edge_runtime.errors import ConfigError
from edge_runtime.messages import EnergySource, EnergyUse, ModelRef
from tests.coordinator import helpers as h

BOARD = EnergySource(sensor="board", scope="module", quality="power", covers="module without carrier")
MODELLED = EnergySource(sensor="modelled", scope="modelled", quality="modelled", covers="share of the agent")
NOTHING = {
    "joules": None,
    "modelled_joules": None,
    "radio_modelled_joules": None,
    "measured_jobs": 0,
    "modelled_jobs": 0,
    "unknown_jobs": 0,
    "doubtful_jobs": 0,
}


def drew(train_mj, sensor="board", **fields):
    """What a job drew by a sensor, that one called "modelled" being a model."""
    return EnergyUse(**{"train_mj": train_mj, "sensor": sensor, "modelled": sensor == "modelled", **fields})


class Run:
    """One run on a store, with devices that report what they like."""

    def __init__(self, folder, sources, **plan):
        self.store = Store(folder, synchronous="OFF")
        self.fleet = h.fleet()
        for name, source in sources.items():
            self.fleet.announce(0.0, h.device(name, energy=source))
        self.plan = h.plan(target=len(sources), **plan)
        self.state = h.start(self.plan, now=5.0)
        self.name = self.state.run.run = self.store.submit(self.plan, self.state.run)
        self.store.save([device.row() for device in self.fleet.devices()])
        self.jobs = {}
        self.tell(e.Tick(10.0))

    def tell(self, event):
        effects = step(self.state, event, self.fleet)
        for effect in effects:
            if isinstance(effect, e.Save):
                self.store.save(effect.rows)
            elif isinstance(effect, e.SendJob):
                self.jobs[effect.assignment.device] = effect.assignment
        return effects

    def update(self, device, energy=None, *, sequence=0, now=20.0, **meta):
        return self.tell(
            h.arrived(
                self.jobs[device], now, sequence=sequence, number=ord(device), energy=energy, train_ms=1500, **meta
            )
        )

    @property
    def summary(self):
        return run_summary(self.store, self.name)

    @property
    def ledger(self):
        return run_ledger(self.store, self.name)


@pytest.fixture
def made(tmp_path):
    runs = []

    def make(sources, **plan):
        runs.append(Run(tmp_path, sources, **plan))
        return runs[-1]

    yield make
    for run in runs:
        run.store.close()


def test_measured_and_modelled_joules_stay_apart(made):
    """In the run, in its rounds and per device; radio is modelled whatever the sensor."""
    run = made({"a": BOARD, "b": MODELLED, "c": None})
    run.update("a", drew(2000, compress_mj=500, other_mj=40, radio_mj=300, idle_mw=1500))
    run.update("b", drew(7000, "modelled", radio_mj=100))
    run.update("c")
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    expected = {
        "joules": 2.54,
        "modelled_joules": 7.0,
        "radio_modelled_joules": 0.4,
        "measured_jobs": 1,
        "modelled_jobs": 1,
        "unknown_jobs": 1,
        "doubtful_jobs": 0,
    }
    assert run.summary["energy"] == expected
    assert run.summary["history"][0]["energy"] == expected
    a, b, c = run.ledger
    assert (a["device"], a["status"], a["sensor"], a["scope"]) == ("a", "counted", "board", "module")
    assert (a["train_joules"], a["compress_joules"], a["idle_watts"], a["train_seconds"]) == (2.0, 0.5, 1.5, 1.5)
    assert (a["other_joules"], a["other_modelled_joules"]) == (0.04, None)
    assert (a["train_modelled_joules"], a["compress_modelled_joules"], a["idle_modelled_watts"]) == (None, None, None)
    assert (b["train_modelled_joules"], b["compress_modelled_joules"], b["train_joules"]) == (7.0, None, None)
    assert b["quality"] == "modelled"
    assert (c["sensor"], c["train_joules"], c["train_modelled_joules"], c["radio_modelled_joules"]) == (None,) * 4
    fleet = {entry["device"]: entry for entry in device_report(run.store, run.store.run(run.name))}
    assert fleet["a"]["energy"]["joules"] == 2.54
    assert fleet["a"]["energy_source"]["covers"] == "module without carrier"
    assert fleet["c"]["energy_source"] is None


def test_a_device_that_fell_back_is_not_said_to_have_measured(made):
    """A model had part in its figure: what its sensor covers stands beside no modelled joules."""
    run = made({"a": BOARD, "b": MODELLED})
    run.update("a", drew(2000, modelled=True))
    run.update("b", EnergyUse(train_mj=3000, sensor="modelled"))  # an announced model outweighs a forgotten flag
    a, b = run.ledger
    assert (a["quality"], a["covers"], a["train_joules"], a["train_modelled_joules"]) == ("modelled", None, None, 2.0)
    assert (b["train_joules"], b["train_modelled_joules"]) == (None, 3.0)
    assert run.summary["energy"]["joules"] is None


@pytest.mark.parametrize(("then", "now"), [(BOARD, MODELLED), (MODELLED, BOARD)])
def test_a_sensor_that_changed_between_job_and_delivery(made, then, now):
    """The update waited while the device went over to another source: its joules stay those of the sensor that it
    names, and later jobs have theirs.
    """
    run = made({"a": then, "b": BOARD}, rounds=2)
    use = drew(2000, then.sensor)
    run.fleet.announce(15.0, h.device("a", energy=now))
    run.update("a", use)
    run.update("b", drew(1000))
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    run.update("a", drew(500, now.sensor), now=40.0)
    first, last = (row for row in run.ledger if row["device"] == "a")
    key = {True: "train_modelled_joules", False: "train_joules"}
    for row, source, joules_ in ((first, then, 2.0), (last, now, 0.5)):
        assert (row["sensor"], row["scope"], row["covers"]) == (source.sensor, source.scope, source.covers)
        assert (row[key[source is MODELLED]], row[key[source is not MODELLED]]) == (joules_, None)


def test_a_sensor_that_was_never_announced_is_named_at_least(made):
    """After a restart of the coordinator, say: what it covers is unknown, and that it measured is the job's word."""
    run = made({"a": MODELLED, "b": BOARD})
    run.update("a", drew(2000, "rapl"))
    run.update("b", drew(1000, "model of old", modelled=True))
    a, b = run.ledger
    assert (a["sensor"], a["scope"], a["quality"], a["covers"], a["train_joules"]) == ("rapl", None, None, None, 2.0)
    assert (b["sensor"], b["scope"], b["quality"], b["covers"]) == ("model of old", "modelled", "modelled", None)
    assert (b["train_joules"], b["train_modelled_joules"]) == (None, 1.0)


def test_sources_that_a_device_announces_do_not_pile_up(made):
    """However many names it makes up, the last ones are kept."""
    run = made({"a": BOARD, "b": BOARD})
    for number in range(100):
        run.fleet.announce(
            15.0, h.device("a", energy=EnergySource(sensor=f"s{number}", scope="board", quality="power"))
        )
    known = run.fleet.get("a").energy_sources
    assert (len(known), "s99" in known, "board" in known) == (SOURCES_KEPT, True, False)


def test_doubt_goes_to_ledger_sums_and_page(made):
    """What a device says speaks against its figures is marked wherever they stand, and they stay in the sums."""
    run = made({"a": BOARD, "b": MODELLED, "c": BOARD})
    run.update("a", drew(2000, doubtful=True))
    run.update("b", drew(3000, "modelled"))
    run.update("c", EnergyUse(sensor="board", doubtful=True))
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    assert [row["doubtful"] for row in run.ledger] == [True, False, False]
    assert run.summary["energy"]["doubtful_jobs"] == run.summary["history"][0]["energy"]["doubtful_jobs"] == 1
    assert run.summary["energy"]["joules"] == 2.0
    lines = page(run.store, run.name)
    assert "energy 2 J measured, 3 J modelled ?" in lines[0]
    assert any(line.startswith("? the joules of 1 job are doubtful") for line in lines)
    assert any(line.startswith("a ") and "2 J measured ?" in line for line in lines)
    assert any(line.startswith("b ") and "?" not in line for line in lines)


def test_a_job_that_only_evaluates_is_known(made):
    """It has neither training nor compression, and what it drew is in the sums."""
    run = made({"a": BOARD})
    run.update("a", EnergyUse(other_mj=700, sensor="board"))
    assert (run.summary["energy"]["joules"], run.summary["energy"]["measured_jobs"]) == (0.7, 1)
    assert (run.ledger[0]["other_joules"], run.ledger[0]["sensor"]) == (0.7, "board")


def test_jobs_that_did_not_count_drew_energy_too(made):
    """Failed jobs and refused updates have their rows; a job that was rejected before it began has none."""
    run = made({"a": BOARD, "b": BOARD, "c": BOARD}, minimum=1)
    run.tell(e.JobReported(20.0, "a", run.jobs["a"].assignment, "too hot", energy=drew(1000)))
    run.update("b", drew(2000), samples=0)
    run.tell(e.JobReported(20.0, "c", run.jobs["c"].assignment, "low battery", rejected=True))
    assert [(row["device"], row["status"], row["train_joules"]) for row in run.ledger] == [
        ("a", "failed", 1.0),
        ("b", "refused", 2.0),
    ]
    assert run.summary["energy"]["joules"] == 3.0


def test_what_is_said_twice_counts_once(made):
    """Messages repeat, servers restart: the sums stay."""
    run = made({"a": BOARD, "b": BOARD})
    failed = e.JobReported(20.0, "a", run.jobs["a"].assignment, "too hot", energy=drew(1000))
    for _ in range(3):
        run.tell(failed)
        run.update("b", drew(2000))
    run.state = RunState.from_rows(run.plan, run.store.load_run(run.name))
    resume(run.state)
    run.tell(failed)
    run.update("b", drew(2000))
    assert run.summary["energy"]["joules"] == 3.0
    assert len(run.ledger) == 2


def test_two_updates_of_one_job_have_two_rows(made):
    """A refused one and the next: both were worked for."""
    run = made({"a": BOARD, "b": BOARD})
    run.update("a", drew(1000), samples=0)
    run.update("a", drew(4000), sequence=1)
    assert [(row["status"], row["train_joules"]) for row in run.ledger] == [("refused", 1.0), ("pending", 4.0)]


@pytest.mark.parametrize("claimed", [10**15, 2**63, 2**64 - 1])
def test_absurd_figures_are_unknown(made, claimed):
    """No device draws that: its update counts, its joules do not, the row says why, and no integer overflows."""
    run = made({"a": BOARD, "b": BOARD})
    run.update("a", drew(claimed, compress_mj=500, other_mj=claimed, radio_mj=claimed, idle_mw=claimed))
    run.update("b", drew(2000))
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    row = run.ledger[0]
    assert (row["status"], row["train_joules"], row["radio_modelled_joules"], row["idle_watts"]) == (
        "counted",
        None,
        None,
        None,
    )
    assert (row["compress_joules"], row["other_joules"]) == (0.5, None)
    assert "more than 10000 W, taken as unknown" in row["note"]
    assert run.summary["energy"]["joules"] == 2.5
    assert run.summary["energy"]["unknown_jobs"] == 1


def test_a_figure_may_be_as_large_as_the_time_allows(made):
    """The bound follows how long the job took by the coordinator's clock, late updates included."""
    run = made({"a": BOARD, "b": BOARD}, rounds=9)
    most_mj = int(1000 * LARGEST_WATTS * 5000)
    run.update("a", drew(most_mj), now=5010.0)
    run.update("b", drew(most_mj), now=20.0)
    assert [row["train_joules"] for row in run.ledger] == [most_mj / 1000, None]


def test_partial_work_counts_and_says_so(made):
    """A job that ended at its limit: usual weight, and why it stopped in the ledger and the history."""
    run = made({"a": BOARD, "b": BOARD})
    run.update("a", drew(1000), stopped="used its 1 J", steps=7)
    run.update("b", drew(900))
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    assert [row["stopped"] for row in run.ledger] == ["used its 1 J", ""]
    assert [row["status"] for row in run.ledger] == ["counted", "counted"]
    assert run.summary["stopped_jobs"] == run.summary["history"][0]["stopped_jobs"] == 1
    text = "\n".join(page(run.store, run.name))
    assert "1 job ended early, at a limit:\n  a, round 1, ended after 7 steps: used its 1 J" in text
    assert (run.ledger[0]["steps"], run.ledger[0]["steps_planned"]) == (7, None), "the plan is in epochs"


def test_jobs_that_ended_early_say_how_far_they_came(made):
    """Steps done of those planned, if the plan counts steps; none without an update; the last jobs are shown."""
    names = "abcde"
    run = made(dict.fromkeys(names, BOARD), training=Training(steps=20))
    for number, name in enumerate(names[:-1], 3):
        run.update(name, drew(1000), stopped="used its 1 J", steps=number)
    run.tell(e.JobReported(20.0, "e", run.jobs["e"].assignment, "killed", energy=drew(5)))
    assert {(row["device"], row["steps"], row["steps_planned"]) for row in run.ledger} == {
        *(("a", 3, 20), ("b", 4, 20), ("c", 5, 20), ("d", 6, 20)),
        ("e", None, None),
    }
    text = "\n".join(page(run.store, run.name))
    assert "4 jobs ended early, at a limit; the last 3, all are in status --json:" in text
    assert "  d, round 1, ended after 6 steps of 20: used its 1 J" in text
    assert "  a, round 1" not in text


def test_without_energy_everything_is_unknown(made):
    """None everywhere, never a zero, and the page has no columns about it."""
    run = made({"a": None, "b": None})
    assert run.summary["energy"] == NOTHING
    run.update("a")
    run.update("b")
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    assert run.summary["energy"] == {**NOTHING, "unknown_jobs": 2}
    text = "\n".join(page(run.store, run.name))
    assert "energy unknown" in text
    assert "sensor" not in text


def test_the_page_says_measured_or_modelled_beside_every_figure(made):
    """In the headline, per round, and per device with its sensor."""
    run = made({"a": BOARD, "b": MODELLED})
    run.update("a", drew(1_234_000, compress_mj=500, radio_mj=12_340))
    run.update("b", drew(2000, "modelled"))
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    lines = page(run.store, run.name)
    assert "energy 1.23 kJ measured, 2 J modelled" in lines[0]
    assert any("radio 12.3 J modelled" in line for line in lines)
    (of_round,) = [line for line in lines if line.startswith("1      ")]
    assert of_round.endswith("1.23 kJ measured, 2 J modelled")
    assert any("board, module, measured" in line and "1.23 kJ measured" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_page_fits_the_terminal(made, width):
    """No line is longer than the terminal is wide: what wraps by itself cannot be redrawn. The joules stay."""
    run = made({"a": BOARD, "b": MODELLED})
    run.update("a", drew(1_234_000, radio_mj=12_340), loss=1.0)
    run.update("b", drew(2000, "modelled"), loss=1.0)
    run.tell(e.Aggregated(30.0, 0, h.blob(50)))
    lines = page(run.store, run.name, width)
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()).count("1.23 kJ measured, 2 J modelled") >= 3


def test_status_json_holds_the_ledger(made, capsys, tmp_path):
    """One flat row per job, with the keys that reports and spreadsheets read."""
    run = made({"a": BOARD, "b": MODELLED})
    run.update("a", drew(2000))
    assert cli.main(["status", run.name, "--json", "--state", str(tmp_path)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["energy"]["joules"] == 2.0
    assert value["ledger"] == run.ledger
    assert list(value["ledger"][0]) == [
        "device",
        "round",
        "assignment",
        "status",
        "sensor",
        "scope",
        "quality",
        "covers",
        "train_joules",
        "compress_joules",
        "other_joules",
        "train_modelled_joules",
        "compress_modelled_joules",
        "other_modelled_joules",
        "radio_modelled_joules",
        "idle_watts",
        "idle_modelled_watts",
        "doubtful",
        "train_seconds",
        "steps",
        "steps_planned",
        "stopped",
        "note",
    ]
    assert cli.main(["runs", "--state", str(tmp_path)]) == 0
    assert "2 J measured" in capsys.readouterr().out


def test_rows_come_back_as_they_went_in(made):
    """With the largest numbers that a row may hold."""
    run = made({"a": BOARD})
    row = LedgerRow(
        run=run.name,
        device="x",
        assignment="r0-9",
        sequence=NO_UPDATE,
        round=3,
        train_mj=2**62,
        stopped="hot",
        note="n",
    )
    run.store.save([row])
    assert (row, "failed", None) in run.store.ledger(run.name)


def test_a_plan_limits_the_joules_of_a_job(tmp_path):
    """``[training] job_joules`` reaches the device with its job; nonsense is refused by name."""
    plan = h.plan(training=Training(epochs=1, job_joules=12.5))
    state = h.start(plan)
    (job,) = h.jobs(step(state, e.Tick(0.0), h.fleet("a", "b")))[:1]
    message = make_job(plan, state.run, job, ModelRef(), now=0.0, chunk_bytes=1024)
    assert message.joule_limit == 12.5
    path = tmp_path / "plan.toml"
    text = 'name = "x"\nbundle = "x"\ndataset = "d"\nrounds = 1\n[participation]\ntarget = 1\n[training]\nepochs = 1\n'
    path.write_text(f"{text}job_joules = 3.0\n")
    assert load_plan(path).training.job_joules == 3.0
    for wrong in ("0.0", "inf", '"much"'):
        path.write_text(f"{text}job_joules = {wrong}\n")
        with pytest.raises(ConfigError, match="job_joules"):
            load_plan(path)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 J"), (0.0123, "0.0123 J"), (999.4, "999 J"), (1000.0, "1 kJ"), (1.5e6, "1.5 MJ")]
)
def test_joules_in_words(value, text):
    """Three digits and a unit."""
    assert joules(value) == text


def test_sources_in_words():
    """A model is never called measured."""
    assert energy_words({"joules": None, "modelled_joules": None, "doubtful_jobs": 0}) == "-"
    assert source_words({"sensor": "x", "scope": "board", "quality": "counter", "covers": ""}) == "x, board, measured"
    assert (
        source_words({"sensor": "agent", "scope": "modelled", "quality": "modelled", "covers": ""}) == "agent, modelled"
    )
    assert source_words(None) == "-"
