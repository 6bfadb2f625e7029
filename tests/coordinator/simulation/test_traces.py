"""Traces: what a link delivers, when a device is there, and files that cannot be used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.simulation.synthetic import BATTERY_WH, FIRST_CHARGE_PERCENT, TRAINING_WATTS, synthetic
from coordinator.simulation.traces import (
    CAP_S,
    DeviceTrace,
    LinkTrace,
    PresenceTrace,
    Traces,
    read_traces,
    write_traces,
)
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

rates = st.lists(st.floats(0, 1e5) | st.just(0.0), min_size=1, max_size=6)


def link(up: list[float], *, step_s: float = 10.0, round_trip_s: float = 0.0) -> LinkTrace:
    """A link whose rates change every ``step_s``."""
    times = [index * step_s for index in range(len(up))]
    return LinkTrace(
        name="l",
        times_s=times,
        up_kbit_s=up,
        down_kbit_s=[0.0] * len(up),
        period_s=len(up) * step_s,
        round_trip_s=round_trip_s,
    )


def delivered(trace: LinkTrace, start: float, seconds: float) -> float:
    """Bytes that go up between ``start`` and ``start + seconds``, a span at a time."""
    width, total, at = trace.times_s[1] if len(trace.times_s) > 1 else trace.period_s, 0.0, start
    while at < start + seconds:
        index = int(at // width)
        end = min((index + 1) * width, start + seconds)
        total += trace.up_kbit_s[index % len(trace.up_kbit_s)] * 125.0 * (end - at)
        at = end if end > at else math.nextafter(at, math.inf)
    return total


@settings(max_examples=150, deadline=None)
@given(rates, st.floats(0, 500), st.floats(1, 1e7))
def test_a_transfer_ends_when_its_bytes_are_through(up: list[float], start: float, size: float) -> None:
    """The link delivers the bytes within the time said, and not a moment sooner; without any rate it is the cap."""
    trace = link(up)
    seconds = trace.transfer_s(start, size, up=True)
    if seconds >= CAP_S or sum(up) == 0:
        assert seconds == CAP_S
        return
    if seconds < 20_000:
        assert delivered(trace, start, seconds) == pytest.approx(size, rel=1e-6, abs=1.0)


def test_transfers_wait_over_gaps_and_periods() -> None:
    """A dead span is waited out, whole periods are counted, the round trip comes on top, down differs from up."""
    trace = link([8.0, 0.0], round_trip_s=0.5)  # 1000 bytes a second for ten seconds, then nothing for ten
    assert trace.transfer_s(0.0, 5000, up=True) == 5.5
    assert trace.transfer_s(0.0, 10_000, up=True) == 10.5
    assert trace.transfer_s(5.0, 6000, up=True) == 16.5
    assert trace.transfer_s(12.0, 1000, up=True) == 9.5
    assert trace.transfer_s(0.0, 35_000, up=True) == 65.5
    assert trace.transfer_s(40.0, 0, up=True) == 0.5
    assert trace.transfer_s(0.0, 1, up=False) == CAP_S
    assert trace.rate_kbit_s(25.0, up=True) == 8.0


spans = st.lists(st.integers(0, 40), max_size=8, unique=True).map(
    lambda ends: list(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)


@settings(max_examples=150, deadline=None)
@given(spans, spans, st.integers(40, 60), st.floats(0, 1e6))
def test_presence_changes_when_it_says(
    online: list[tuple[float, float]], charging: list[tuple[float, float]], period: int, at: float
) -> None:
    """Between a moment and its next change nothing changes, and at the change something does; then there is another."""
    trace = PresenceTrace(name="p", online=online, charging=charging, period_s=period)
    state = trace.online_at(at), trace.charging_at(at)
    change = trace.next_change_s(at)
    if math.isinf(change):
        assert all((trace.online_at(at + s), trace.charging_at(at + s)) == state for s in range(2 * period))
        return
    assert at < change <= at + period
    before = (at + change) / 2, math.nextafter(change, 0.0)
    assert all(moment < at or (trace.online_at(moment), trace.charging_at(moment)) == state for moment in before)
    assert (trace.online_at(change), trace.charging_at(change)) != state
    assert trace.next_change_s(change) > change


def test_no_change_of_presence_is_passed_over() -> None:
    """Walking from change to change over a year, with fractions of a second, sees each of them."""
    trace = PresenceTrace(name="p", online=[(0.1, 0.7), (33.3, 1000.7)], period_s=1234.567)
    at, seen = 0.0, 0
    for _ in range(100_000):
        before = trace.online_at(at)
        at = trace.next_change_s(at)
        seen += trace.online_at(at) != before
    assert seen == 100_000
    assert at == pytest.approx(25_000 * 1234.567, rel=1e-4)


def test_spans_that_touch_are_one() -> None:
    """A device that is online over the end of the period does not leave there."""
    trace = PresenceTrace(name="p", online=[(0, 10), (10, 20), (50, 60)], period_s=60)
    assert trace.next_change_s(0.0) == 20
    assert trace.next_change_s(50.0) == 80
    always = PresenceTrace(name="p", online=[(0, 60)], period_s=60)
    assert math.isinf(always.next_change_s(5.0))
    assert always.online_at(1e9)


def test_traces_survive_their_files(tmp_path: Path) -> None:
    """What was written is read back equal, and the same seed gives the same fleet."""
    fleet = synthetic(300, 7)
    write_traces(fleet, tmp_path)
    assert read_traces(tmp_path) == fleet == synthetic(300, 7)
    assert synthetic(300, 8) != fleet


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("devices.jsonl", '{"device":"a","link":"l","presence":"p","slowdown":0}', "slowdown must be a number > 0.0"),
        ("devices.jsonl", '{"device":"a","link":"l","presence":"p","battery":3}', "unknown key 'battery'"),
        ("devices.jsonl", '{"device":"a","link":"x","presence":"p"}', "no trace 'x' in links.jsonl"),
        ("devices.jsonl", '{"device":"d","link":"l","presence":"p"}', "device 'd' is there twice"),
        ("devices.jsonl", '{"device":"a",', "is not valid JSON"),
        ("devices.jsonl", '{"device":"a","presence":"p"}', "the key 'link' is missing"),
        ("devices.jsonl", '["a", "l", "p"]', "is a list, but must be an object with keys"),
        ("devices.jsonl", '{"device":"a","link":"l","presence":"p","idle_watts":"1"}', "idle_watts is text in quotes"),
        ("links.jsonl", '{"name":"m","times_s":[0,5],"up_kbit_s":[1],"down_kbit_s":[1],"period_s":9}', "equally long"),
        ("links.jsonl", '{"name":"m","times_s":[0],"up_kbit_s":[-1],"down_kbit_s":[1],"period_s":9}', "up_kbit_s"),
        ("links.jsonl", '{"name":"m","times_s":[1],"up_kbit_s":[1],"down_kbit_s":[1],"period_s":9}', "begin with 0"),
        ("presence.jsonl", '{"name":"q","online":[[5,3]],"period_s":9}', "must be spans [from, to] that ascend"),
        ("presence.jsonl", '{"name":"q","online":[[5,13]],"period_s":9}', "within period_s"),
        ("presence.jsonl", '{"name":"q","online":[[5,5]],"period_s":9}', "must be spans"),
        ("presence.jsonl", '{"name":"p","online":[],"period_s":9}', "'p' is there twice"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, file: str, line: str, said: str) -> None:
    """The error names the file, the line and what is wrong."""
    write_traces(
        Traces(
            devices=[DeviceTrace(device="d", link="l", presence="p")],
            links={"l": link([1.0])},
            presences={"p": PresenceTrace(name="p", online=[(0, 1)], period_s=1)},
        ),
        tmp_path,
    )
    with (tmp_path / file).open("a") as out:
        out.write("\n" + line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_traces(tmp_path)
    assert f"{tmp_path / file}:3: " in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A folder that holds no traces says which file it lacks; an empty fleet is refused."""
    with pytest.raises(ConfigError, match=r"links\.jsonl: cannot be read"):
        read_traces(tmp_path)
    for name in ("devices.jsonl", "links.jsonl", "presence.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"devices\.jsonl: holds no device"):
        read_traces(tmp_path)


def test_synthetic_devices_are_of_the_published_classes() -> None:
    """Power, battery and first charge belong together as published, and devices differ in speed, link and presence."""
    fleet = synthetic(600, 0)
    for watts, battery_wh, (low, high) in zip(TRAINING_WATTS, BATTERY_WH, FIRST_CHARGE_PERCENT, strict=True):
        kind = [device for device in fleet.devices if device.training_watts == watts]
        assert 150 < len(kind) < 250
        assert all(device.battery_wh == battery_wh and low <= device.battery_percent <= high for device in kind)
    shares = [
        sum(end - begin for begin, end in fleet.presences[device.presence].online) / 86_400 for device in fleet.devices
    ]
    assert 0.5 < sum(shares) / len(shares) < 0.75
    assert min(shares) < 0.4
    assert all(not trace.charging for trace in synthetic(5, 0, charging=False).presences.values())


def test_a_fleet_can_be_larger_than_its_traces() -> None:
    """Further devices have names and offsets of their own; fewer are the first ones."""
    fleet = synthetic(3, 1)
    assert fleet.resized(2).devices == fleet.devices[:2]
    larger = fleet.resized(8)
    assert len({device.device for device in larger.devices}) == 8
    assert larger.devices[3].slowdown == fleet.devices[0].slowdown
    assert larger.devices[3].presence_offset_s != fleet.devices[0].presence_offset_s
    msgspec.convert(msgspec.to_builtins(larger.devices), list[DeviceTrace])


def test_a_large_fleet_is_cheap_to_make() -> None:
    """A hundred thousand devices share their links and days."""
    fleet = synthetic(100_000, 0)
    assert len(fleet.devices) == 100_000
    assert len(fleet.links) == 256
    assert len(fleet.presences) == 512
