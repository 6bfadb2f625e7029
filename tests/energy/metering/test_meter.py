"""Windows of the meter: joules, baselines, failover, and what speaks against a figure."""

from __future__ import annotations

import math
from random import Random

import pytest

from energy.errors import SensorError
from energy.metering.conditions import Conditions
from energy.metering.meter import Meter
from energy.sensors.base import Rail
from tests.energy.meter_tools import Clock, Counter, Power, pass_time

CALM = Conditions(temperature_c=40.0, throttled=(), events={}, clocks_hz={"policy0": 1_500_000_000}, power_mode="15W")


def test_constant_power_is_power_times_time() -> None:
    """Ten seconds at 5 W are 50 J, with edges between readings."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda _: 5.0)]], clock=clock)
    pass_time(meter, clock, 0.55)
    window = meter.open("work")
    pass_time(meter, clock, 10.03, 0.07)
    result = window.close()
    assert result.joules == pytest.approx(50.15)
    assert result.valid
    assert result.rails == {"board-power in": pytest.approx(50.15)}
    assert result.samples == 144
    assert result.source is not None
    assert result.source.sensor == "board-power"


def test_slope_is_integrated_by_trapezoids() -> None:
    """Power that rises linearly is integrated exactly."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda now: now - 95.0)]], clock=clock)
    with meter.open("ramp") as window:
        pass_time(meter, clock, 10.0, 0.3)
    assert window.measurement is not None
    assert window.measurement.joules == pytest.approx(100.0)


def test_windows_nest_and_overlap() -> None:
    """Parts of a window add up to it, and windows do not disturb each other."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda now: 3 + math.sin(now))]], clock=clock)
    outer = meter.open("outer")
    parts = []
    for _ in range(5):
        with meter.open("part") as part:
            pass_time(meter, clock, 1.03)
        parts.append(part.close())
    total = outer.close()
    assert total.joules == pytest.approx(sum(part.joules or 0.0 for part in parts), rel=1e-6)
    assert part.close() is parts[-1]


def test_joules_so_far_grow_while_the_window_is_open() -> None:
    """A running window tells its joules, so that a job can stop at a limit."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda _: 4.0)]], clock=clock)
    window = meter.open("job")
    pass_time(meter, clock, 2.0)
    assert window.joules() == pytest.approx(8.0)
    pass_time(meter, clock, 1.0)
    assert window.joules() == pytest.approx(12.0)


def test_counter_that_wraps_is_no_negative_energy() -> None:
    """A 32-bit counter of microjoules starts again in the middle of a window."""
    clock = Clock()
    sensor = Counter(clock, 50.0, wraps_at=2**32 * 1e-6)
    meter = Meter([[sensor]], clock=clock)
    with meter.open("wrap") as window:
        pass_time(meter, clock, 200.0, 0.5)
    assert window.close().joules == pytest.approx(10_000.0)
    assert window.close().valid


def test_counter_needs_no_readings_between_the_edges_unless_it_wraps() -> None:
    """A pause is no problem for a counter, but is one when it may have gone round meanwhile."""
    clock = Clock()
    meter = Meter([[Counter(clock, 50.0)]], clock=clock)
    with meter.open("long") as window:
        clock.now += 100.0
    assert window.close().valid
    assert window.close().joules == pytest.approx(5000.0)
    meter = Meter([[Counter(clock, 50.0, wraps_at=3000.0)]], clock=clock)
    with meter.open("long") as window:
        pass_time(meter, clock, 1.0)
        clock.now += 50.0
        meter.sample()
    assert any("gap" in problem for problem in window.close().problems)


def test_gap_between_power_readings_is_a_problem_and_named() -> None:
    """Two seconds without a reading at 10 Hz make the figure doubtful."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda now: 5.0 + now % 0.3)]], clock=clock)
    with meter.open("work") as window:
        pass_time(meter, clock, 1.0)
        clock.now += 2.0
        pass_time(meter, clock, 1.0)
    result = window.close()
    assert result.longest_gap_s == pytest.approx(2.1)
    assert not result.valid
    assert "2.10 s" in result.problems[0]


def test_a_battery_gauge_that_never_moves_is_frozen() -> None:
    """A coarse sensor keeps its value for a while, not for ever."""
    clock = Clock()
    gauge = Power(clock, lambda _: 5.0, "battery", quality="coarse", interval_s=5.0)
    gauge.frozen_s = 300.0
    meter = Meter([[gauge]], clock=clock)
    pass_time(meter, clock, 200.0, 5.0)
    assert meter.source is not None
    pass_time(meter, clock, 200.0, 5.0)
    assert meter.source is None


def test_no_sensor_is_unknown_never_zero() -> None:
    """Without any sensor joules are None, with a reason."""
    said: list[str] = []
    meter = Meter([], clock=Clock(), on_change=said.append)
    result = meter.open("work").close()
    assert (result.joules, result.source, result.half_width_joules) == (None, None, None)
    assert result.problems
    assert "no sensor" in said[0]


def test_sensor_that_vanishes_hands_over_and_says_so() -> None:
    """The next best sensor takes over within the window; the joules so far are kept, and the change is told."""
    clock = Clock()
    first, second = Power(clock, lambda _: 5.0, "usb-meter"), Power(clock, lambda _: 3.0, "rail", scope="module")
    said: list[str] = []
    meter = Meter([[first], [second]], clock=clock, on_change=said.append)
    assert meter.source == first.source
    window = meter.open("job")
    pass_time(meter, clock, 10.0)
    first.fault = SensorError("vanished", "usb-meter was unplugged")
    pass_time(meter, clock, 10.0)
    result = window.close()
    assert meter.source == second.source
    assert result.source == second.source
    assert result.joules == pytest.approx(10 * 5 + 0.1 * 5 + 9.9 * 3)
    assert result.half_width_joules is None
    assert not result.valid
    assert "usb-meter was unplugged" in result.problems[0]
    assert "goes on with rail" in said[0]


def test_one_hiccup_of_a_bus_is_no_failure() -> None:
    """A read that fails once and works the next moment changes nothing."""
    clock = Clock()
    sensor = Power(clock, lambda _: 5.0)
    meter = Meter([[sensor]], clock=clock)
    real, failures = sensor.read, [SensorError("vanished", "bus busy")]

    def read() -> tuple[float, ...]:
        if failures and clock() > 101:
            raise failures.pop()
        return real()

    sensor.read = read
    with meter.open("job") as window:
        pass_time(meter, clock, 3.0)
    assert not failures
    assert window.close().valid
    assert window.close().joules == pytest.approx(15.0)


def test_modelled_joules_never_count_as_measured() -> None:
    """A window that a model finishes is modelled as a whole, and says how much of it was measured."""
    clock = Clock()
    real, model = Power(clock, lambda _: 5.0), Counter(clock, 2.0, "model", scope="modelled", quality="modelled")
    meter = Meter([[real], [model]], clock=clock)
    window = meter.open("job")
    pass_time(meter, clock, 4.0)
    real.fault = SensorError("vanished", "gone")
    pass_time(meter, clock, 4.0)
    result = window.close()
    assert result.source is not None
    assert result.source.modelled
    assert result.half_width_joules is None
    assert any("20.5 J of it were measured" in problem for problem in result.problems)


def test_joules_are_unknown_when_the_last_sensor_is_gone() -> None:
    """What is known is told, with its share of the time; the figure is None, since it is not that of the window."""
    clock = Clock()
    sensor = Power(clock, lambda _: 5.0)
    meter = Meter([[sensor]], clock=clock)
    window = meter.open("job")
    pass_time(meter, clock, 2.0)
    sensor.fault = SensorError("vanished", "gone")
    pass_time(meter, clock, 2.2)
    assert window.joules() is None
    assert window.at_least() == pytest.approx(10.5)  # the last power holds until the failure is seen
    result = window.close()
    assert result.joules is None
    assert window.at_least() == pytest.approx(10.5)
    assert any("10.5 J are known, of 50% of the time" in problem for problem in result.problems), result.problems


def test_known_joules_grow_again_when_the_only_sensor_is_back() -> None:
    """A job still stops at its limit after its sensor was away for a while; the whole stays unknown."""
    clock = Clock()
    sensor = Power(clock, lambda _: 5.0)
    said: list[str] = []
    meter = Meter([[sensor]], clock=clock, on_change=said.append)
    window = meter.open("job")
    assert window.at_least() == 0.0
    pass_time(meter, clock, 10.0)
    sensor.fault = SensorError("vanished", "gone")
    pass_time(meter, clock, 20.0)
    sensor.fault = None
    pass_time(meter, clock, 20.0)
    assert "again" in said[-1]
    grown = window.at_least() or 0.0
    assert 85.0 < grown < 105.0
    pass_time(meter, clock, 10.0)
    assert window.at_least() == pytest.approx(grown + 50.0)
    assert window.joules() is None
    result = window.close()
    assert (result.joules, result.source) == (None, None)
    assert any("known, of" in problem for problem in result.problems)
    assert any("again" in problem for problem in result.problems)
    with meter.open("next") as after:
        pass_time(meter, clock, 2.0)
    assert after.close().joules == after.at_least() == pytest.approx(10.0)


def test_nothing_is_known_at_least_where_nothing_could_be_read() -> None:
    """Never a silent zero."""
    meter = Meter([], clock=Clock())
    window = meter.open("work")
    assert window.at_least() is None
    window.close()
    assert window.at_least() is None


def test_better_sensor_comes_back_between_windows_only() -> None:
    """A plug that was away is used again, never in the middle of a window."""
    clock = Clock()
    plug, model = Power(clock, lambda _: 5.0, "plug"), Counter(clock, 2.0, "model", quality="modelled")
    said: list[str] = []
    meter = Meter([[plug], [model]], clock=clock, on_change=said.append)
    plug.fault = SensorError("vanished", "no Wi-Fi")
    pass_time(meter, clock, 0.1)
    assert meter.source == model.source
    plug.fault = None
    window = meter.open("job")
    pass_time(meter, clock, 60.0)
    assert meter.source == model.source
    window.close()
    meter.sample()
    assert meter.source == plug.source
    assert "again" in said[-1]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e6])
def test_absurd_reading_is_left_out_and_named(value: float) -> None:
    """One wrong value among good ones is not integrated, and makes the window doubtful."""
    clock = Clock()
    values = {"next": 5.0}
    meter = Meter([[Power(clock, lambda _: values.pop("next", 5.0))]], clock=clock)
    window = meter.open("job")
    pass_time(meter, clock, 1.0)
    values["next"] = value
    pass_time(meter, clock, 1.0)
    result = window.close()
    assert result.joules == pytest.approx(10.0)
    assert "left out" in result.problems[0]


def test_sensor_that_only_says_absurd_things_is_given_up() -> None:
    """Negative power again and again is a failure."""
    clock = Clock()
    level = [5.0]
    meter = Meter([[Power(clock, lambda _: level[0])]], clock=clock)
    level[0] = -2.0
    clock.now += 0.1
    meter.sample()
    assert meter.source is None


def test_frozen_power_is_noticed_and_repeats_are_not() -> None:
    """Values that repeat a few times are normal; one that never changes again is a broken sensor."""
    clock = Clock()
    random = Random(3)
    stuck = [False]
    last = [5.0]

    def watts(_: float) -> float:
        if not stuck[0] and random.random() < 0.4:
            last[0] = 5.0 + round(random.random(), 2)
        return last[0]

    meter = Meter([[Power(clock, watts)]], clock=clock)
    with meter.open("job") as window:
        pass_time(meter, clock, 120.0)
    assert window.close().valid
    stuck[0] = True
    window = meter.open("job")
    pass_time(meter, clock, 120.0)
    assert meter.source is None
    assert "exactly the same" in window.close().problems[0]


def test_pause_of_the_program_is_no_frozen_sensor() -> None:
    """The same value after an hour without readings says nothing against the sensor."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda _: 5.0)]], clock=clock)
    pass_time(meter, clock, 1.0)
    clock.now += 3600.0
    pass_time(meter, clock, 20.0)
    assert meter.source is not None


def test_counter_that_stands_still_is_frozen() -> None:
    """A machine that runs draws power, so its counter moves."""
    clock = Clock()
    meter = Meter([[Counter(clock, 0.0)]], clock=clock)
    window = meter.open("job")
    assert window.close().joules is None  # not 0
    pass_time(meter, clock, 20.0)
    assert meter.source is None


def test_zero_watts_of_a_running_machine_are_implausible() -> None:
    """A plug with nothing behind it is no measurement of this machine."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda _: 0.0, quality="coarse")]], clock=clock)
    pass_time(meter, clock, 5.0)
    assert meter.source is None


def test_cpu_and_gpu_add_up_and_their_rails_stay_apart() -> None:
    """Sensors of one way are summed; the worst quality of them is that of the sum."""
    clock = Clock()
    cpu = Counter(clock, 20.0, "rapl", scope="package", domain="cpu")
    gpu = Power(clock, lambda _: 30.0, "nvml", scope="package", domain="gpu", quality="power")
    meter = Meter([[cpu, gpu]], clock=clock)
    with meter.open("job") as window:
        pass_time(meter, clock, 10.0)
    result = window.close()
    assert result.joules == pytest.approx(500.0)
    assert result.rails == {"rapl in": pytest.approx(200.0), "nvml in": pytest.approx(300.0)}
    assert result.source is not None
    assert result.source[:3] == ("rapl+nvml", "package", "power")
    meter.close()
    assert cpu.closed == gpu.closed == 1


def test_coarse_counter_must_agree_with_the_power_beside_it() -> None:
    """A plug's watt-hours check the integral of its watts, and are never added to it."""
    clock = Clock()
    for factor, agrees in ((1.0, True), (1.5, False)):
        sensor = Power(clock, lambda _: 60.0, "plug", quality="coarse", interval_s=1.0)
        sensor.rails = (Rail("plug", "board", "watts"), Rail("plug counter", "board", "joules", in_total=False))
        sensor.read = lambda factor=factor: (60.0, 3600.0 * int(factor * 60.0 * clock() / 3600.0))
        meter = Meter([[sensor]], clock=clock)
        with meter.open("hour") as window:
            pass_time(meter, clock, 3600.0, 1.0)
        assert window.close().joules == pytest.approx(216_000.0)
        assert window.close().valid is agrees, window.close().problems


def test_interval_covers_what_noise_does() -> None:
    """The true joules of noisy power lie within the stated half-width about 19 times of 20."""
    clock = Clock()
    random = Random(5)
    meter = Meter([[Power(clock, lambda _: 8.0 + random.gauss(0.0, 1.0))]], clock=clock)
    inside = 0
    widths = []
    for _ in range(200):
        with meter.open("job") as window:
            pass_time(meter, clock, 5.0)
        result = window.close()
        widths.append(result.half_width_joules or 0.0)
        inside += abs((result.joules or 0.0) - 40.0) <= widths[-1]
    assert inside >= 185
    assert 0.5 < sum(widths) / 200 < 2.5  # 1.96 x 1 W x sqrt(50) x 0.1 s = 1.4 J, and the edges


def test_window_too_short_for_its_sensor_is_doubtful() -> None:
    """50 ms of a sensor that speaks ten times a second are no measurement."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda _: 5.0)]], clock=clock)
    window = meter.open("blink")
    clock.now += 0.05
    assert "too short" in window.close().problems[0]


@pytest.mark.parametrize(
    ("later", "word"),
    [
        (CALM._replace(throttled=("under-voltage",)), "under-voltage"),
        (CALM._replace(events={"oc1_event_cnt": 3}), "oc1_event_cnt"),
        (CALM._replace(power_mode="MAXN"), "power mode"),
    ],
)
def test_throttling_and_modes_mark_a_window(later: Conditions, word: str) -> None:
    """Throttling now, a grown counter of it, or another power mode make a figure doubtful; before, it was not."""
    clock = Clock()
    now = [CALM._replace(events={"oc1_event_cnt": 1})]
    meter = Meter([[Power(clock, lambda _: 5.0)]], clock=clock, conditions=lambda: now[0])
    with meter.open("before") as before:
        pass_time(meter, clock, 3.0)
    window = meter.open("job")
    pass_time(meter, clock, 1.5)
    now[0] = later
    pass_time(meter, clock, 1.5)
    now[0] = CALM._replace(events=later.events)
    result = window.close()
    assert before.close().valid
    assert [word in problem for problem in result.problems] == [True], result.problems


@pytest.mark.parametrize("fallen", [False, True])
def test_ceiling_of_the_clock_counts_not_every_move_of_a_governor(fallen: bool) -> None:
    """A governor that goes up and down is no problem; a ceiling that falls for the second half is."""
    clock = Clock()

    def conditions() -> Conditions:
        high = 1.5e9 if clock() < 115 or not fallen else 1.2e9
        hertz = int(high if int(clock()) % 2 else 6e8)
        return CALM._replace(clocks_hz={"policy0": hertz, "policy4": int(5e8)})

    meter = Meter([[Power(clock, lambda _: 5.0)]], clock=clock, conditions=conditions)
    with meter.open("job") as window, meter.open("idle", idle=True) as idle:
        pass_time(meter, clock, 30.0)
    assert ["CPU clock" in problem for problem in window.close().problems] == ([True] if fallen else [])
    assert idle.close().valid


def test_day_long_window_keeps_no_readings() -> None:
    """What a window holds does not grow with its length."""
    import tracemalloc

    clock = Clock()
    random = Random(1)
    meter = Meter([[Power(clock, lambda _: 5.0 + random.random())]], clock=clock, conditions=lambda: CALM)
    window = meter.open("day")
    pass_time(meter, clock, 200.0)
    tracemalloc.start()
    pass_time(meter, clock, 2000.0)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 10_000
    assert window.close().samples == 22_000
