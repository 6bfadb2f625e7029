"""The fleet registry: presence, eligibility, and two agents with one name."""

from __future__ import annotations

import pytest

from coordinator.fleet import CONFLICT_S, Fleet, requirement, unfit
from edge_runtime.messages import DatasetInfo, Heartbeat, Limits
from tests.coordinator import helpers as h


@pytest.fixture
def fleet():
    return Fleet()


NEED = requirement(h.plan(), blob_bytes=1000)


def test_joining_is_told_from_repetition(fleet):
    """A retained copy seen twice is no news; a new session, or coming back, is."""
    assert fleet.announce(0.0, h.device("a"))
    assert not fleet.announce(1.0, h.device("a"))
    assert fleet.announce(2.0, h.device("a", session="s2"))
    assert not fleet.announce(3.0, h.device("a", session="s2", online=False))
    assert fleet.announce(4.0, h.device("a", session="s2"))


def test_late_last_will_of_an_old_session_is_ignored(fleet):
    """The broker may publish the will of a replaced connection after the new one announced itself."""
    fleet.announce(0.0, h.device("a", session="new"))
    fleet.announce(1.0, h.device("a", session="old", online=False))
    assert fleet.get("a").online


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"online": False}, "offline"),
        ({"datasets": [DatasetInfo(name="other")]}, "no dataset 'digits'"),
        ({"codecs": ["zstd"]}, "lacks codec 'raw'"),
        ({"methods": []}, "lacks method 'fedavg'"),
        ({"schema_versions": (3, 4)}, "message versions 3 to 4"),
        ({"limits": Limits(blob_bytes=10, worker_memory_bytes=10)}, "blobs of at most 10 bytes"),
    ],
)
def test_eligibility_follows_the_announcement(fleet, changes, reason):
    """Only what was announced is asked for; the reason is one a user understands."""
    fleet.eligible(NEED)
    fleet.announce(0.0, h.device("a", **changes))
    assert reason in unfit(fleet.get("a"), NEED)
    assert set(fleet.eligible(NEED)) == (set() if reason else {"a"})


def test_eligible_sets_are_kept_up_to_date(fleet):
    """Leaving, changing and coming back moves a device in and out."""
    fleet.announce(0.0, h.device("a"))
    assert set(fleet.eligible(NEED)) == {"a"}
    fleet.gone(1.0, "a")
    assert not fleet.eligible(NEED)
    fleet.announce(2.0, h.device("a", session="s2"))
    assert set(fleet.eligible(NEED)) == {"a"}
    fleet.announce(3.0, h.device("a", session="s2", codecs=[]))
    assert not fleet.eligible(NEED)


def test_two_agents_with_one_name_are_set_aside(fleet):
    """Taking turns is the sign: both evict each other at the broker. The mark goes when only one is left."""
    fleet.announce(0.0, h.device("a", instance="one", session="1"))
    fleet.announce(1.0, h.device("a", instance="two", session="2"))
    assert not fleet.get("a").conflict  # a replaced SD card looks like this
    fleet.announce(2.0, h.device("a", instance="one", session="3"))
    assert "two agents use the name 'a'" in fleet.get("a").conflict
    assert not fleet.eligible(NEED)
    assert fleet.get("a").row().conflict
    fleet.contact(3.0 + CONFLICT_S, "a")
    assert set(fleet.eligible(NEED)) == {"a"}


def test_conflict_is_seen_through_the_last_wills_between(fleet):
    """The evicted agent's will arrives before it is back; that does not hide the conflict."""
    for now, instance in enumerate(["one", "two", "one"]):
        fleet.announce(now, h.device("a", instance=instance, session=str(now)))
        fleet.announce(now + 0.5, h.device("a", instance=instance, session=str(now), online=False))
    fleet.announce(9.0, h.device("a", instance="two", session="9"))
    assert fleet.get("a").conflict


def test_heartbeat_and_contact_are_kept(fleet):
    """The latest heartbeat and the time of the last message stand in the device's row."""
    fleet.announce(0.0, h.device("a"))
    heartbeat = Heartbeat(uptime_s=5, temperature_c=61)
    fleet.measured(7.0, "a", heartbeat)
    row = fleet.get("a").row()
    assert (row.heartbeat, row.last_contact_unix_s) == (heartbeat, 7.0)
    assert fleet.get("a").heartbeat_unix_s == 7.0


def test_a_heartbeat_that_comes_before_its_device_is_not_lost(fleet):
    """Both are retained, and a broker gives them to a new coordinator in any order."""
    fleet.measured(1.0, "a", Heartbeat(battery_percent=20))
    fleet.measured(2.0, "a", Heartbeat(battery_percent=30))
    fleet.announce(3.0, h.device("a"))
    assert fleet.get("a").heartbeat.battery_percent == 30


def test_reasons_are_kept_up_to_date(fleet):
    """Who cannot take part is there with the reason; who becomes eligible is counted as an arrival."""
    fleet.announce(0.0, h.device("a"))
    fleet.announce(0.0, h.device("b", methods=[]))
    assert dict(fleet.unfit_reasons(NEED)) == {"b": "lacks method 'fedavg'"}
    arrivals = fleet.arrivals(NEED)
    fleet.announce(1.0, h.device("a"))
    assert fleet.arrivals(NEED) == arrivals
    fleet.announce(2.0, h.device("b"))
    fleet.gone(3.0, "a")
    assert dict(fleet.unfit_reasons(NEED)) == {"a": "offline"}
    assert fleet.arrivals(NEED) == arrivals + 1
