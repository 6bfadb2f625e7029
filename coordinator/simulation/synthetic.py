"""A synthetic fleet of battery devices, in the format of recorded traces.

Three classes with the power and the batteries that the EAFL simulator publishes (Arouj and Abdelmoniem, "Towards
Energy-Aware Federated Learning on Battery-Powered Clients", 2022: 6.33, 5.44 and 2.98 W above idle; 5000, 4000 and
3000 mAh, here at 5 V) and its first charges of 10-50, 20-60 and 30-90 %. Speeds and links are lognormal. A device
comes and goes all day and charges some hours at night; the clock starts at eight in the morning.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coordinator.simulation.traces import DeviceTrace, LinkTrace, PresenceTrace, Traces

TRAINING_WATTS = (6.33, 5.44, 2.98)
BATTERY_WH = (25.0, 20.0, 15.0)
FIRST_CHARGE_PERCENT = ((10.0, 50.0), (20.0, 60.0), (30.0, 90.0))
SLOWDOWN = (1.0, 1.75, 3.75)  # medians
SLOWDOWN_SPREAD = 0.5  # of the logarithm
RESERVE_PERCENT = 5.0
IDLE_WATTS = 0.05
CHARGE_WATTS = 10.0
RADIO_JOULES_PER_MB = 1.2

LINKS, PRESENCES = 256, 512  # so many different ones; devices share them at offsets of their own
_LINK_STEPS, _LINK_STEP_S = 60, 30.0
_MEDIAN_KBIT_S = 8000.0
_DAY_S = 86_400.0


def synthetic(count: int, seed: int, *, charging: bool = True) -> Traces:
    """``count`` devices named d00000 and so on; without ``charging`` a flat battery stays flat.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"a fleet of {count} devices cannot be made; ask for 1 or more")
    random = np.random.default_rng([seed, 0x7ACE5])
    links = {trace.name: trace for trace in _links(random, min(count, LINKS))}
    presences = {trace.name: trace for trace in _presences(random, min(count, PRESENCES), charging=charging)}
    kinds = random.integers(0, 3, count)
    slowdown = np.array(SLOWDOWN)[kinds] * random.lognormal(0.0, SLOWDOWN_SPREAD, count)
    low, high = np.array(FIRST_CHARGE_PERCENT).T
    charge = random.uniform(low[kinds], high[kinds])
    link, presence = random.integers(0, len(links), count), random.integers(0, len(presences), count)
    link_offset = random.uniform(0.0, _LINK_STEPS * _LINK_STEP_S, count)
    samples = np.clip(random.lognormal(4.2, 0.7, count), 20, 400).astype(int)
    columns = (kinds, slowdown, charge, link, link_offset, presence, samples)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    devices = [_device(number, row) for number, row in enumerate(rows)]
    return Traces(devices=devices, links=links, presences=presences)


def _device(number: int, row: tuple[Any, ...]) -> DeviceTrace:
    kind, slowdown, charge, link, link_offset, presence, samples = row
    return DeviceTrace(
        device=f"d{number:05}",
        slowdown=round(slowdown, 4),
        training_watts=TRAINING_WATTS[kind],
        idle_watts=IDLE_WATTS,
        radio_joules_per_mb_up=RADIO_JOULES_PER_MB,
        radio_joules_per_mb_down=RADIO_JOULES_PER_MB,
        battery_wh=BATTERY_WH[kind],
        battery_percent=round(charge, 2),
        reserve_percent=RESERVE_PERCENT,
        charge_watts=CHARGE_WATTS,
        link=f"link-{link}",
        link_offset_s=round(link_offset, 1),
        presence=f"day-{presence}",
        samples=samples,
    )


def _links(random: np.random.Generator, count: int) -> list[LinkTrace]:
    """Lognormal between links (sigma 1), and slowly fading within one (sigma 0.4); up is a third of down."""
    times = [step * _LINK_STEP_S for step in range(_LINK_STEPS)]
    found = []
    for number in range(count):
        median = _MEDIAN_KBIT_S * random.lognormal(0.0, 1.0)
        noise = random.normal(0.0, 1.0, _LINK_STEPS)
        fading = np.zeros(_LINK_STEPS)
        for step in range(1, _LINK_STEPS):
            fading[step] = 0.9 * fading[step - 1] + 0.19**0.5 * noise[step]
        down = np.round(median * np.exp(0.4 * fading), 1)
        found.append(
            LinkTrace(
                name=f"link-{number}",
                times_s=times,
                up_kbit_s=np.round(down / 3, 1).tolist(),
                down_kbit_s=down.tolist(),
                period_s=_LINK_STEPS * _LINK_STEP_S,
                round_trip_s=round(float(random.uniform(0.02, 0.2)), 3),
            )
        )
    return found


def _presences(random: np.random.Generator, count: int, *, charging: bool) -> list[PresenceTrace]:
    """Days on and off: a share of 30 to 95 % of the time online, in spells whose lengths are exponential."""
    found = []
    for number in range(count):
        share, cycle = random.uniform(0.3, 0.95), random.uniform(5400.0, 16_200.0)
        online = spells(random, share * cycle, (1 - share) * cycle, _DAY_S)
        nights: list[tuple[float, float]] = []
        if charging:
            begin = random.uniform(13.0, 17.0) * 3600.0  # plugged in between nine in the evening and one at night
            nights = [(begin, min(begin + random.uniform(5.0, 9.0) * 3600.0, _DAY_S))]
        found.append(PresenceTrace(name=f"day-{number}", online=online, charging=nights, period_s=_DAY_S))
    return found


def spells(random: np.random.Generator, on_s: float, off_s: float, period_s: float) -> list[tuple[float, float]]:
    """Spans of whole seconds, on and off by turns for exponential times of these means, at least a minute each."""
    at = -float(random.uniform(0.0, on_s + off_s))
    spans: list[tuple[float, float]] = []
    while at < period_s:
        end = at + max(float(random.exponential(on_s)), 60.0)
        begin, until = float(round(max(at, 0.0))), float(round(min(end, period_s)))
        if until > begin:
            spans.append((begin, until))
        at = end + max(float(random.exponential(off_s)), 60.0)
    return spans
