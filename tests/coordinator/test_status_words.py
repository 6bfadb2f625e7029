"""What status and devices say of heartbeats, modes and jobs that were declined."""

from __future__ import annotations

import time

import msgspec
import pytest

from coordinator import events as e
from coordinator.cli_status import tell_rounds
from coordinator.fleet import Device
from coordinator.plan import Training
from coordinator.report import device_report, failures, round_progress, run_summary
from coordinator.rounds import step
from coordinator.status_page import accuracy_words, device_table, figures, headline, page, phase
from coordinator.store import Store
from coordinator.wording import duration
from edge_runtime.messages import Evaluation, Heartbeat
from tests.coordinator import helpers as h


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path, synchronous="OFF")
    yield made
    made.close()


class Run:
    """A run whose steps are stored."""

    def __init__(self, store, plan, *names):
        self.store, self.state, self.fleet = store, h.start(plan), h.fleet()
        self.name = self.state.run.run = store.submit(plan, self.state.run)
        for name in names:
            self.fleet.announce(0.0, h.device(name, abilities=["standing"]))

    def step(self, event):
        effects = step(self.state, event, self.fleet)
        for save in h.of(e.Save, effects):
            self.store.save(save.rows)
        return effects


BEAT = Heartbeat(
    battery_percent=71,
    on_external_power=True,
    temperature_c=48,
    temperature_margin_c=12,
    link_metered=True,
    up_kbit_s=2500,
    availability_percent=80,
    declines=3,
)


def test_devices_show_what_their_heartbeats_say(store):
    """Battery, heat, link and availability, in words; and the limit for which a device would decline any job."""
    store.save([Device("a", h.device("a"), 5.0, heartbeat=BEAT).row(), Device("b", h.device("b"), 5.0).row()])
    report = device_report(store)
    assert report[0]["heartbeat"]["battery_percent"] == 71
    assert report[0]["heartbeat"]["declines"] == "hours"
    assert report[1]["heartbeat"] is None
    title, first, second = device_table(report, 6.0, lives=True)
    assert title.split()[4:8] == ["battery", "heat", "link", "available"]
    for words in ("71 % plugged in", "48 C, 12 below its cap", "2.5 Mbit/s up, ? down, metered", "80 %"):
        assert words in first
    assert first.endswith("declines jobs: hours")
    assert second.split()[5:] == ["-", "-", "-", "-", "digits", "(10)"]


def test_columns_of_which_nobody_knows_anything_are_left_out(store):
    """A heartbeat without a battery needs no column for it."""
    store.save([Device("a", h.device("a"), 5.0, heartbeat=Heartbeat(temperature_c=40)).row()])
    title, _ = device_table(device_report(store), 6.0, lives=True)
    assert "heat" in title
    assert "battery" not in title
    assert "link" not in title


def test_a_heartbeat_of_newer_software_is_shown(store):
    """A limit that this version does not know is called that."""
    store.save([Device("a", h.device("a"), 5.0, heartbeat=Heartbeat(declines=200)).row()])
    assert "a limit that this version does not know" in device_table(device_report(store), 6.0, lives=True)[1]


def test_declined_jobs_are_counted_apart_from_failed_ones(store):
    """In the summary, in the open round and among the reasons."""
    run = Run(store, h.plan(target=2, minimum=2), "a", "b", "c")
    first, second = h.jobs(run.step(e.Tick(0.0)))
    run.step(e.JobReported(1.0, first.device, first.assignment, "only at night", rejected=True, declined_s=99.0))
    run.step(e.JobReported(2.0, second.device, second.assignment, "out of memory"))
    stored = store.run(run.name)
    counts = round_progress(store, stored)
    assert counts == {"asked": 3, "delivered": 0, "failed": 1, "declined": 1, "open": 1}
    assert run_summary(store, run.name)["declined_jobs"] == 1
    told = {entry["device"]: (entry["declined"], entry["reason"]) for entry in failures(store, stored)}
    assert told == {first.device: (True, "only at night"), second.device: (False, "out of memory")}
    store.server_lives("coordinator", 1e12)
    assert phase(store, run.name).endswith("0 of 2 updates, 1 device at work, 1 failed, 1 declined, attempt 1")
    assert f"  {first.device} declined: only at night" in page(store, run.name)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("buffered", "buffered, model 1: 1 of 3 updates, 2 devices at work, 0 failed"),
        ("anarchic", "anarchic, model 1: 1 of 3 updates, 3 devices with a standing assignment, 0 failed"),
    ],
)
def test_a_run_without_rounds_says_what_it_does(store, mode, words):
    """How many updates the next model has, and how many devices are at it."""
    run = Run(store, h.plan(mode=mode, target=3, training=Training(steps=5)), "a", "b", "c")
    effects = run.step(e.Tick(0.0))
    if mode == "anarchic":
        standing = h.of(e.SendStanding, effects)[0].assignment
        effects = run.step(e.Pulled(1.0, standing.device, standing.assignment, 0, 3))
    run.step(h.arrived(h.jobs(effects)[0], 2.0))
    assert phase(store, run.name) == words
    assert run_summary(store, run.name)["mode"] == mode


def test_a_watched_round_is_told_once_it_is_evaluated(store, capsys):
    """The accuracy beside it is that of the test set, as in status, and not that of the devices."""
    run = Run(store, h.plan(target=1, rounds=3, test_set="test.npz"), "a")
    run.state.run.test_set = h.blob(3)
    (job,) = h.jobs(run.step(e.Tick(0.0)))
    on_devices = Evaluation(samples=10, loss_sum=1.0, correct=9)
    run.step(h.arrived(job, 1.0))
    run.step(e.Aggregated(2.0, 0, h.blob(20)))
    assert tell_rounds(store, run.name, 0, as_json=False) == 0
    assert capsys.readouterr().out == ""
    run.step(e.Evaluated(3.0, 1, msgspec.structs.replace(on_devices, correct=5)))
    assert tell_rounds(store, run.name, 0, as_json=False) == 1
    assert "accuracy 50.00 %," in capsys.readouterr().out
    assert tell_rounds(store, run.name, 1, as_json=False) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"accuracy": 0.5, "device_accuracy": 0.9}, "50.00 %"),
        ({"accuracy": None, "device_accuracy": 0.9}, "90.00 % on devices"),
        ({"accuracy": None, "device_accuracy": None}, "-"),
    ],
)
def test_an_accuracy_on_devices_is_called_that(entry, words):
    """It is of other data, and often higher."""
    assert accuracy_words(entry) == words


def test_runs_and_status_agree_on_bytes(store):
    """Bundles are beside what went down; an initial model's accuracy is called that; 1.0 times more is as many."""
    run = Run(store, h.plan(target=1), "a")
    summary = run_summary(store, run.name) | {"bytes_up": 19_300, "bytes_down": 47_400, "bytes_bundle": 34_900}
    summary |= {"accuracy": 0.5, "ratio_up": 0.98, "ratio_down": 2.0}
    assert figures(summary) == ["50.00 % (initial model)", "19.3 kB", "12.5 kB", "34.9 kB"]
    line = headline(summary)
    assert "19.3 kB up (as many as float32), 12.5 kB down (2.0x fewer) beside 34.9 kB of bundles" in line


@pytest.mark.parametrize(("seconds", "words"), [(58.2, "58 s"), (900.0, "15 min"), (21_597.0, "6 h"), (3e5, "3 days")])
def test_times_to_wait_are_in_units_that_people_would_choose(seconds, words):
    """Nobody counts 21597 seconds."""
    assert duration(seconds) == words


def test_a_waiting_round_says_whom_it_waits_for(store):
    """Devices that declined or whose owners' limits hold are named, with when they are asked again."""
    run = Run(store, h.plan(target=2, minimum=1, deadline_s=1e6), "a", "b")
    now = time.time()
    store.save([row for name in "ab" for row in [Device(name, h.device(name), now).row()]])
    assert phase(store, run.name) == "round 1 selects among 2 devices"
    store.save([e.HistoryRow(run=run.name, device="a", not_before_unix_s=now + 21_599.0, declined=True)])
    store.save([Device("b", h.device("b"), now, heartbeat=BEAT).row()])
    said = phase(store, run.name)
    assert said.startswith("round 1 waits for devices: 2 fit, 2 wanted, 2 of them held: a declined in ")
    assert said.endswith("asked again in 6 h; b declines jobs: hours")
    assert "asked again in 6 h" in "\n".join(device_table(device_report(store), now, lives=True))
