"""A fleet out of recorded traces, in the simulator's format.

    python -m benchmarks.fleet_traces --devices 120 --seed 0 --output FOLDER

Speed: the CPU floating-point scores of AI-Benchmark's phones with at least 1 GB, turned into training times by the two
of them whose training FLASH measured layer by layer (Redmi Note 8, which is the reference device, and Galaxy Note 10):
time falls with a power of the score. Power, batteries and first charges are EAFL's three classes, by terciles of
speed, so joules are those of a device model. Links: throughput logs of 3G in trams, trains, buses, cars and on ferries
(their uplink, which was not logged, is the share of the downlink that one of FLASH's distributions has), and as many
that draw a rate per half minute from FLASH's nineteen distributions of up- and downlinks, taken as kbit/s. Charging:
FLASH's half-hourly record of when phones were idle, charging and on Wi-Fi, from its third day on; unknown counts as
not. Presence: nobody logged when phones with the screen off can be reached, so that is synthetic (on for 30 to 95 % of
the day in spells) beside the recorded spans. Devices train on battery whenever they are online.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import parser
from coordinator.simulation.synthetic import (
    BATTERY_WH,
    CHARGE_WATTS,
    FIRST_CHARGE_PERCENT,
    IDLE_WATTS,
    RADIO_JOULES_PER_MB,
    RESERVE_PERCENT,
    TRAINING_WATTS,
    spells,
)
from coordinator.simulation.traces import DeviceTrace, LinkTrace, PresenceTrace, Traces, write_traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FOLDERS = ("flash_devices", "availability_flash", "net_3g_hsdpa")
MEASURED = {"redmi_note8": "Xiaomi Redmi Note 8", "samsung_note10": "Samsung Galaxy Note10"}  # the first is slowdown 1
LAYERS = ("embedding", "lstm", "output")
MIN_MEMORY_GB = 1.0
LINK_STEP_S, LINK_STEPS = 30.0, 120  # of the links that are drawn from distributions
LOG_STEP_S = 5.0  # logs are averaged over so long
MIN_LOG_S = 120.0
START_S = 48 * 3600.0  # of the record of availability: its first two days are mostly unknown


def recorded(data: Path, count: int, seed: int) -> Traces:
    """``count`` devices drawn from the recordings below ``data``.

    Raises:
        SystemExit: the recordings are not there.
    """
    missing = [name for name in FOLDERS if not (data / name).is_dir()]
    if missing:
        raise SystemExit(f"{data}: holds no {', '.join(missing)}; name the folder of the data sets with --data")
    random = np.random.default_rng([seed, 0xF1EE7])
    links = {link.name: link for link in _links(data, random)}
    presences = {presence.name: presence for presence in _presences(data, random)}
    slowdowns, memories = phones(data / "flash_devices")
    borders = np.quantile(slowdowns, [1 / 3, 2 / 3])
    link_names, presence_names = list(links), list(presences)
    devices = []
    for number in range(count):
        phone = int(random.integers(len(slowdowns)))
        kind = int(np.searchsorted(borders, slowdowns[phone]))
        low, high = FIRST_CHARGE_PERCENT[kind]
        link = links[link_names[random.integers(len(link_names))]]
        devices.append(
            DeviceTrace(
                device=f"d{number:04}",
                slowdown=round(float(slowdowns[phone]), 4),
                training_watts=TRAINING_WATTS[kind],
                idle_watts=IDLE_WATTS,
                radio_joules_per_mb_up=RADIO_JOULES_PER_MB,
                radio_joules_per_mb_down=RADIO_JOULES_PER_MB,
                battery_wh=BATTERY_WH[kind],
                battery_percent=round(float(random.uniform(low, high)), 2),
                reserve_percent=RESERVE_PERCENT,
                charge_watts=CHARGE_WATTS,
                link=link.name,
                link_offset_s=round(float(random.uniform(0.0, link.period_s)), 1),
                presence=presence_names[random.integers(len(presence_names))],
                presence_offset_s=START_S,
                memory_mb=int(memories[phone] * 1000),
            )
        )
    return Traces(devices=devices, links=links, presences=presences)


def phones(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times as slow as the reference phone, and memory in GB, of every phone in the table; float64 ``[n]``."""
    table: list[dict[str, str]] = json.loads((folder / "raw_ai_benchmark_list.json").read_text(encoding="utf-8"))
    rows = [(float(row["CPU_F_AI_Score"]), float(row["RAM"].removesuffix("GB"))) for row in table]
    scores, memories = np.array([row for row in rows if row[1] >= MIN_MEMORY_GB]).T
    with np.load(folder / "op_latency.npz", allow_pickle=False) as file:
        seconds = [sum(float(np.median(file[f"{key}__{layer}__Y"])) for layer in LAYERS) for key in MEASURED]
    known = []
    for name in MEASURED.values():  # a name sold with two processors counts with the mean of their logarithms
        logs = [math.log(float(row["CPU_F_AI_Score"])) for row in table if row["Model"] == name]
        known.append(sum(logs) / len(logs))
    exponent = math.log(seconds[0] / seconds[1]) / (known[1] - known[0])
    return np.exp(exponent * (known[0] - np.log(scores))), memories


def _links(data: Path, random: np.random.Generator) -> list[LinkTrace]:
    speeds: Mapping[str, Mapping[str, float]] = json.loads(
        (data / "flash_devices" / "speed_distri.json").read_text(encoding="utf-8")
    )
    kinds = list(speeds.values())
    logs: dict[str, list[tuple[float, float]]] = {}
    with gzip.open(data / "net_3g_hsdpa" / "traces_3g.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{row['split']}-{row['trace']}")[:64]
            logs.setdefault(name, []).append((float(row["t_s"]), float(row["mbps"]) * 1000.0))
    found = []
    for name, log in logs.items():
        if log[-1][0] < MIN_LOG_S:
            continue
        kind = kinds[random.integers(len(kinds))]
        found.append(_logged(name, np.array(log), min(kind["up_u"] / kind["down_u"], 1.0)))
    drawn = [_drawn(f"distribution-{number}", kinds[number % len(kinds)], random) for number in range(len(found))]
    return found + drawn


def _logged(name: str, log: NDArray[np.float64], up_share: float) -> LinkTrace:
    """Mean rates over steps of the log; a step without a sample keeps the rate before it."""
    steps = int(log[-1, 0] // LOG_STEP_S)
    at = np.minimum((log[:, 0] // LOG_STEP_S).astype(int), steps - 1)
    counts, sums = np.bincount(at, minlength=steps), np.bincount(at, weights=log[:, 1], minlength=steps)
    filled = np.maximum.accumulate(np.where(counts > 0, np.arange(steps), 0))
    down = (sums / np.maximum(counts, 1))[filled]
    return _link(name, down, down * up_share, LOG_STEP_S, round_trip_s=0.1)


def _drawn(name: str, kind: Mapping[str, float], random: np.random.Generator) -> LinkTrace:
    """Normal rates of one distribution, at least a tenth of its mean."""
    rates = {
        way: np.maximum(random.normal(kind[f"{way}_u"], kind[f"{way}_sigma"], LINK_STEPS), kind[f"{way}_u"] / 10)
        for way in ("down", "up")
    }
    return _link(name, rates["down"], rates["up"], LINK_STEP_S, round_trip_s=0.03)


def _link(
    name: str, down: NDArray[np.float64], up: NDArray[np.float64], step_s: float, *, round_trip_s: float
) -> LinkTrace:
    return LinkTrace(
        name=name,
        times_s=(np.arange(len(down)) * step_s).tolist(),
        up_kbit_s=np.round(up, 1).tolist(),
        down_kbit_s=np.round(down, 1).tolist(),
        period_s=len(down) * step_s,
        round_trip_s=round_trip_s,
    )


def _presences(data: Path, random: np.random.Generator) -> list[PresenceTrace]:
    """One per recorded phone: it charges when it was recorded, and is online then and in synthetic spells."""
    with np.load(data / "availability_flash" / "availability.npz", allow_pickle=False) as file:
        state, step_s = file["state"], float(np.ravel(file["step_minutes"])[0]) * 60.0
    period_s = len(state) * step_s
    found = []
    for number, column in enumerate(state.T):
        share, cycle_s = random.uniform(0.3, 0.95), random.uniform(5400.0, 16_200.0)
        charging = _spans(column == 1, step_s)
        online = merged([*spells(random, share * cycle_s, (1 - share) * cycle_s, period_s), *charging])
        found.append(PresenceTrace(name=f"phone-{number}", online=online, charging=charging, period_s=period_s))
    return found


def _spans(on: NDArray[Any], step_s: float) -> list[tuple[float, float]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(int)))
    return [(float(begin * step_s), float(end * step_s)) for begin, end in edges.reshape(-1, 2)]


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans, ascending."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def main() -> int:
    """Writes the fleet as files that `edge-coordinator simulate --traces` reads."""
    options = parser(__doc__)
    options.add_argument("--devices", type=int, default=120)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = options.parse_args()
    write_traces(recorded(arguments.data, arguments.devices, arguments.seed), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
