"""What status and devices say of heartbeats, modes and jobs that were declined."""

from __future__ import annotations

import pytest

from coordinator import events as e
from coordinator.fleet import Device
from coordinator.plan import Training
from coordinator.report import device_report, failures, round_progress, run_summary
from coordinator.rounds import step
from coordinator.status_page import device_table, page, phase
from coordinator.store import Store
from edge_runtime.messages import Heartbeat
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
