"""What virtual devices know of themselves: heartbeats that age, owners' limits, heat, and clocks that are set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.plan import Training
from coordinator.simulation import FaultPlan, Settings, simulate
from coordinator.simulation.owner import Heat, HeatTrace, OwnerLimits
from coordinator.simulation.server import VirtualServer
from coordinator.simulation.settings import START_UNIX_S
from coordinator.simulation.synthetic import synthetic
from coordinator.simulation.traces import read_traces, write_traces
from coordinator.simulation.worker import VirtualWorker
from coordinator.simulation.world import World
from edge_runtime.agent.limits import held
from edge_runtime.errors import ConfigError
from edge_runtime.messages import DECLINES
from tests.coordinator.simulation import helpers as h

if TYPE_CHECKING:
    from coordinator.simulation.device import VirtualDevice

HOUR_S = 3600.0


@pytest.fixture
def begun(monkeypatch) -> list[tuple[VirtualDevice, float]]:
    """Devices and virtual times of all trainings that begin; each must be allowed by its owner."""
    found: list[tuple[VirtualDevice, float]] = []
    start = VirtualWorker.start

    def watched(self, *arguments: Any) -> None:
        limit = held(self._device.conditions.known(), self._device.owner_limits)
        assert limit is None, limit
        found.append((self._device, self._world.timeline.now_s))
        start(self, *arguments)

    monkeypatch.setattr(VirtualWorker, "start", watched)
    return found


@pytest.fixture
def seen(monkeypatch) -> list[tuple[str, float, float, Any]]:
    """What selectors saw: device, now, when its heartbeat came (in virtual time), and the heartbeat."""
    found: list[tuple[str, float, float, Any]] = []
    refresh = VirtualServer._refresh

    def watched(self, device):
        refresh(self, device)
        came_s = device.heartbeat_unix_s - START_UNIX_S
        found.append((device.name, self._world.timeline.now_s, came_s, device.heartbeat))

    monkeypatch.setattr(VirtualServer, "_refresh", watched)
    return found


def run(tmp_path, *devices, rounds=12, steps=10, step_s=10.0, target=1, **spans):
    """Many short rounds; a device that declines is asked again within minutes."""
    plan = h.plan(
        tmp_path,
        target=target,
        rounds=rounds,
        attempts=10_000,
        deadline_s=7200.0,
        training=Training(steps=steps, batch_size=8),
    )
    return simulate(plan, h.traces(*devices, **spans), Settings(step_s=step_s, limit_s=80_000.0, tick_s=10.0))


ALWAYS = [(0.0, 100_000.0)]


def test_only_when_charging(tmp_path, begun):
    """Jobs begin while the device charges, and one that runs when it is unplugged ends with what it reached."""
    device = h.device(presence="desk", battery_wh=50.0, training_watts=1.0, limits=OwnerLimits(only_when_charging=True))
    charging = [(5000.0, 8030.0), (20_000.0, 30_000.0)]
    report = run(tmp_path, device, rounds=60, desk=(ALWAYS, charging))
    assert report.outcomes["declined"] > 0
    assert all(5000.0 <= at < 8030.0 or 20_000.0 <= at < 30_000.0 for _, at in begun)
    assert len(begun) > 20
    assert all(job.steps == 10 for job in report.assignments)
    drew = report.modelled_joules.training
    assert drew < 100.0 * len(begun)  # the one that was cut short


def test_hours(tmp_path, begun):
    """Jobs begin within the owner's hours, by the device's clock."""
    report = run(tmp_path, h.device(limits=OwnerLimits(hours="02:00-03:00, 12:00-12:30")), rounds=50)
    assert report.outcomes["declined"] > 0
    assert len(begun) > 20
    assert all(2.0 <= at / HOUR_S < 3.0 or 12.0 <= at / HOUR_S < 12.5 for _, at in begun)


def test_only_unmetered(tmp_path, begun):
    """Where every byte is paid for, or nobody knows whether, nothing is trained."""
    limits = OwnerLimits(only_unmetered=True)
    devices = [h.device(name, metered=paid, limits=limits) for name, paid in (("a", True), ("b", False), ("c", None))]
    run(tmp_path, *devices, rounds=20, target=2)
    assert {device.name for device, _ in begun} == {"b"}


def test_joules_per_day(tmp_path, begun):
    """A day's jobs draw no more than the owner allows; the next day begins anew."""
    device = h.device(training_watts=2.0, limits=OwnerLimits(joules_per_day=1000.0))
    plan = h.plan(tmp_path, target=1, rounds=30, attempts=10_000, training=Training(steps=10, batch_size=8))
    settings = Settings(step_s=10.0, limit_s=3 * 86_400.0, tick_s=60.0)
    report = simulate(plan, h.traces(device), settings)
    by_day = [sum(200.0 for _, at in begun if at // 86_400 == day) for day in range(3)]
    assert by_day[0] == by_day[1] == 1000.0  # five jobs of 200 J
    assert report.outcomes["declined"] > 0
    left = h.device(training_watts=2.0, limits=OwnerLimits(joules_per_day=50.0))
    cut = run(tmp_path, left, rounds=1)
    assert cut.modelled_joules.training == pytest.approx(60.0)  # the first job, cost unknown: ends when it is used up


def test_data_mb_per_month(tmp_path, begun):
    """What jobs move over the link stays within the cap."""
    free = run(tmp_path, h.device(), rounds=3)
    cap = free.versions[3].bytes_up + free.versions[3].bytes_down
    begun.clear()
    report = run(tmp_path, h.device(limits=OwnerLimits(data_mb_per_month=cap / 1e6)), rounds=12)
    assert len(begun) in (2, 3)
    assert report.outcomes["declined"] > 0
    assert report.versions[-1].bytes_up + report.versions[-1].bytes_down <= cap


def test_battery_reserve(tmp_path, begun):
    """Below the owner's reserve nothing begins; a device that the reserve stops is not lost, as an empty one is."""
    device = h.device(
        presence="desk",
        training_watts=36.0,
        battery_wh=10.0,
        battery_percent=60.0,
        charge_watts=100.0,
        limits=OwnerLimits(battery_reserve_percent=50.0),
    )
    report = run(tmp_path, device, rounds=8, desk=(ALWAYS, [(30_000.0, 40_000.0)]))
    assert report.lost_to_battery == 0
    assert report.outcomes["declined"] > 0
    assert any(at < 1000.0 for _, at in begun)
    assert not any(1000.0 < at < 30_000.0 for _, at in begun)


def test_heat(tmp_path, begun):
    """Training warms a device up to its cap; then its job ends, and the next one begins when it has cooled down."""
    device = h.device(
        training_watts=5.0,
        heat=HeatTrace(ambient_c=20.0, degrees_per_watt=10.0, time_constant_s=200.0),
        limits=OwnerLimits(max_temperature_c=50.0),
    )
    report = run(tmp_path, device, rounds=8, steps=100)
    assert report.status == "finished"
    whole = 5.0 * 100 * 10.0
    assert report.modelled_joules.training < 0.5 * whole * len(begun)
    assert len(begun) >= 8


def test_heat_follows_its_equation():
    """After one time constant 63 % of the way to where its watts lead; at the start it is where idling leads."""
    heat = Heat(HeatTrace(ambient_c=20.0, degrees_per_watt=10.0, time_constant_s=100.0))
    heat.begin(1.0)
    assert heat.celsius(50.0) == 30.0
    heat.set_watts(50.0, 4.0)
    assert heat.celsius(150.0) == pytest.approx(30.0 + 30.0 * (1 - math.exp(-1)))
    heat.set_watts(150.0, 0.0)
    assert heat.celsius(1e6) == pytest.approx(20.0)


def test_limits_and_heat_are_told(tmp_path, seen):
    """Heartbeats say which limit holds, the margin to the cap, and what is left of the day and the month."""
    limits = OwnerLimits(
        only_when_charging=True,
        max_temperature_c=60.0,
        joules_per_day=500.0,
        data_mb_per_month=7.0,
        hours="00:00-24:00",
    )
    device = h.device(
        battery_wh=5.0, idle_watts=1.0, metered=False, limits=limits, heat=HeatTrace(degrees_per_watt=5.0)
    )
    plan = h.plan(tmp_path, target=1, rounds=1, selector="energy_aware")
    simulate(plan, h.traces(device), Settings(limit_s=100.0))
    said = seen[0][3]
    assert DECLINES[said.declines] == "charging"
    assert (said.temperature_c, said.temperature_margin_c) == (30, 30)
    assert (said.joules_left, said.data_left_mb, said.link_metered) == (500, 7, False)


def test_limits_survive_files(tmp_path):
    """They are keys of the device's line, and what cannot be used is named with its place."""
    limits = OwnerLimits(hours="22:00-06:00", joules_per_day=100.0)
    device = h.device(limits=limits, metered=True, heat=HeatTrace(degrees_per_watt=4.0))
    write_traces(h.traces(device), tmp_path)
    assert read_traces(tmp_path).devices == [device]
    for wrong, said in (
        ('"limits":{"hours":"late"}', "no list of hours"),
        ('"limits":{"at_night":true}', "unknown key"),
        ('"limits":{"joules_per_day":0}', "joules_per_day"),
        ('"heat":{}', "degrees_per_watt"),
    ):
        (tmp_path / "devices.jsonl").write_text(f'{{"device":"a","link":"fast","presence":"always",{wrong}}}\n')
        with pytest.raises(ConfigError) as caught:
            read_traces(tmp_path)
        assert "devices.jsonl:1: " in str(caught.value)
        assert said in str(caught.value)


def test_heartbeats_are_as_old_as_a_daemons(tmp_path, seen):
    """Selectors see what devices said at their last beat: of all ages up to the interval, with the battery as then."""
    devices = [
        h.device(f"d{number}", battery_wh=0.1, battery_percent=100.0, idle_watts=0.36) for number in range(40)
    ]  # a percent in ten seconds
    plan = h.plan(tmp_path, target=2, rounds=30, selector="energy_aware", training=Training(steps=2, batch_size=8))
    simulate(plan, h.traces(*devices), Settings(step_s=10.0, limit_s=900.0))
    later = [(name, now - came, heartbeat) for name, now, came, heartbeat in seen if now > 100.0]
    ages = {name: age for name, age, _ in later}
    assert all(0.0 <= age <= 50.0 for _, age, _ in later)
    assert len({round(age, 3) for age in ages.values()}) > 20
    assert min(age for _, age, _ in later) < 5.0
    assert max(age for _, age, _ in later) > 45.0
    for _, _, came, heartbeat in seen:
        assert heartbeat.uptime_s == pytest.approx(max(0.0, came), abs=1.0)
        assert heartbeat.battery_percent == pytest.approx(100.0 - heartbeat.uptime_s / 10.0, abs=1.5)


def test_a_device_that_trains_is_seen_as_it_was_before(tmp_path, seen):
    """A battery that training has drained since the last beat is not known to be so before the next one."""
    device = h.device("d", battery_wh=1.0, training_watts=36.0)  # a percent a second
    plan = h.plan(tmp_path, target=1, rounds=3, selector="energy_aware", training=Training(steps=1, batch_size=8))
    simulate(plan, h.traces(device), Settings(step_s=20.0, tick_s=1.0, heartbeat_interval_s=1000.0))
    assert len({now for _, now, _, _ in seen}) >= 3
    assert {heartbeat.battery_percent for _, _, _, heartbeat in seen} == {100}


def test_a_device_that_joins_says_how_it_is(tmp_path, seen):
    """The beat of a new connection is there at once, and the next ones count from it."""
    there = h.device("there")
    late = h.device("late", presence="later", battery_wh=1.0, battery_percent=50.0, idle_watts=0.36)
    plan = h.plan(tmp_path, target=2, rounds=20, minimum=1, selector="energy_aware", deadline_s=100.0)
    simulate(
        plan,
        h.traces(there, late, later=([(333.0, 100_000.0)], [])),
        Settings(step_s=20.0, limit_s=3000.0),
    )
    came = sorted({came for name, _, came, _ in seen if name == "late"})
    assert came[0] == pytest.approx(333.0, abs=0.5)
    assert all((at - came[0]) % 50.0 == pytest.approx(0.0, abs=1e-6) for at in came)


@pytest.fixture
def worlds(monkeypatch) -> list[World]:
    """Those of all simulations."""
    found: list[World] = []
    begin = World.run_to_end
    monkeypatch.setattr(World, "run_to_end", lambda self: (found.append(self), begin(self))[1])
    return found


def test_clocks_of_devices_jump(tmp_path, worlds):
    """With the fault, clocks of some devices are set while they run, and what they foresee and count goes by them."""
    limits = OwnerLimits(joules_per_day=1e6, hours="00:00-24:00")
    devices = [h.device(f"d{number}", training_watts=1.0, limits=limits) for number in range(20)]
    plan = h.plan(tmp_path, target=5, rounds=20, attempts=50, deadline_s=200.0)
    settings = Settings(seed=3, step_s=10.0)
    report = simulate(plan, h.traces(*devices), settings, faults=FaultPlan(clock=3))
    assert report.status == "finished", report.reason
    (world,) = worlds
    first = {device.name: world.clock_offset_s(device.number) for device in world.devices}
    now = {device.name: device.conditions._clock(0.0) - START_UNIX_S for device in world.devices}
    moved = [name for name in first if first[name] != now[name]]
    assert len(moved) >= 5
    assert report.faults["device clocks"] >= len(moved)


@pytest.mark.parametrize("seed", range(6))
def test_a_clock_that_is_set_without_a_crash_does_no_harm(tmp_path, worlds, seed):
    """The coordinator's clock jumps while it runs, both ways: every round closes, within its deadlines by true time."""
    plan = h.plan(tmp_path, rounds=8, target=4, over_commit=1.3, deadline_s=300.0, attempts=50, retain_updates="all")
    report = simulate(plan, synthetic(30, seed), Settings(seed=seed, step_s=1.0), faults=FaultPlan(clock=6))
    assert report.status == "finished", report.reason
    assert report.verified_versions == 8
    assert report.virtual_s < 8 * 300.0 * 5
    server = worlds[0].server
    assert len(server._jumps) - 1 > server._process - 1  # some without a new process
