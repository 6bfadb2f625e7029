"""The candidates of a selection as columns: what heartbeats, announcements and histories say, float64 ``[n]`` each.

A column is made when it is first asked for. NaN: unknown. What cannot be true (a step in no time or of a day, a loss
that is negative or not finite) is unknown, too. The one rule for what is unknown is ``filled``: the median of what is
known of the other candidates, and if nothing is known at all, the constant that stands here.
"""

from __future__ import annotations

from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.heartbeats import COLUMNS, NOTHING, bundle_number
from coordinator.scheduling.draws import Column, Mask, filled, median, uniforms
from edge_runtime.agent.radio import RADIOS
from edge_runtime.messages import DECLINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import RoundRequest
    from coordinator.scheduling.notes import Marks

UNKNOWN_STEP_S = 0.1
UNKNOWN_WATTS = 4.0  # while training: a Raspberry Pi 4 at work, above idle
UNKNOWN_BYTES_PER_S = 1e6
UNKNOWN_SAMPLES = 512.0
UNKNOWN_BATTERY_WH = 10.0
UNKNOWN_CHARGE = 0.5
STEP_S_BOUNDS = (1e-5, 3600.0)
STEP_J_BOUNDS = (1e-6, 1e6)
LARGEST_LOSS = 1e6
LARGEST_SAMPLES = 1e9
_WIFI_J, _LTE_J = (  # per 10^6 bytes, up and down
    (RADIOS[name].joules_per_mb_up or 0.0, RADIOS[name].joules_per_mb_down or 0.0) for name in ("wifi", "lte")
)
FORGIVEN_ROUNDS = 10.0  # in which half of a device's failures are forgotten
STALE_S = 600.0  # of a heartbeat: what an older one said of battery, heat, memory, link and limits may be long over
FASTEST = 64.0  # times the median: what is said beyond is taken for that


class _Known:
    """Attributes of the objects of those candidates that have one."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self._count = len(objects)
        self._there = [number for number, entry in enumerate(objects) if entry is not None]
        self._objects = objects if len(self._there) == self._count else [objects[number] for number in self._there]

    def values(self, name: str) -> list[Any]:
        """Of those that have an object."""
        return list(map(attrgetter(name), self._objects))

    def column(self, name: str, missing: float = np.nan) -> Column:
        return self.spread(self.values(name), missing)

    def spread(self, values: list[Any], missing: float = np.nan) -> Column:
        """One value per object as a column of all candidates; None becomes NaN."""
        known = np.array(values, dtype=np.float64)
        if len(self._there) == self._count:
            return known
        column = np.full(self._count, missing)
        column[self._there] = known
        return column


class Table:
    """Candidates in the order of ``request.candidates``. Of a stale heartbeat nothing is known.

    Args:
        fleet: where heartbeats and announcements come from; a device that it does not know has neither.
        request: of the selection.
        now: unix seconds by the coordinator's clock, as heartbeats were stamped.
    """

    def __init__(self, fleet: FleetView, request: RoundRequest, now: float) -> None:
        self.request = request
        self.names = request.candidates
        self.count = len(self.names)
        devices = list(map(fleet.get, self.names))
        said = b"".join([NOTHING if device is None else device.numbers for device in devices])
        rows = np.frombuffer(said, "<f8").reshape(self.count, len(COLUMNS))
        self._devices = _Known(devices)
        self.heartbeat_age_s = np.abs(now - self._devices.column("heartbeat_unix_s"))  # one ahead of a set clock, too
        self.stale = np.asarray(self.heartbeat_age_s > STALE_S)
        columns = rows.T.copy()
        columns[:, self.stale] = np.frombuffer(NOTHING, "<f8")[:, np.newaxis]
        self._said: dict[str, Column] = dict(zip(COLUMNS, columns, strict=True))
        self._past = _Known(list(map(request.history.get, self.names)))

    # What devices say of themselves.
    @cached_property
    def declines(self) -> Column:
        """Index into ``DECLINES`` of the owner's limit for which a device would decline now; 0: none."""
        return self._said["declines"]

    @cached_property
    def charge(self) -> Column:
        """Share of the battery that is full, 0 to 1."""
        return self._said["battery_percent"] / 100.0

    @cached_property
    def reserve(self) -> Column:
        """Share of the battery that the owner wants left."""
        return self._said["reserve_percent"] / 100.0

    @cached_property
    def on_battery(self) -> Mask:
        """Whether a job would draw on a battery: it says so, or it has one and does not say that it is plugged in."""
        plugged = self._said["on_external_power"]
        return np.asarray((plugged == 0.0) | (np.isnan(plugged) & ~np.isnan(self.charge)))

    @cached_property
    def capacity_j(self) -> Column:
        """Of the full battery; announced."""
        return filled(_within(self._devices.column("state.battery_wh"), 1e-2, 1e6), UNKNOWN_BATTERY_WH) * 3600.0

    @cached_property
    def temperature_margin_c(self) -> Column:
        """Kelvins below the device's thermal cap."""
        return self._said["temperature_margin_c"]

    @cached_property
    def free_memory_mb(self) -> Column:
        """In 10^6 bytes."""
        return self._said["free_memory_mb"]

    @cached_property
    def availability(self) -> Column:
        """How likely a device thinks it could train during the next hour, 0 to 1."""
        return self._said["availability_percent"] / 100.0

    @cached_property
    def data_left_bytes(self) -> Column:
        """Of this month's cap; infinite for the largest value that a heartbeat holds."""
        left = self._said["data_left_mb"]
        return np.where(left >= 0xFFFF, np.inf, left * 1e6)

    @cached_property
    def joules_left(self) -> Column:
        """Of this day."""
        return self._said["joules_left"]

    # What jobs take.
    @cached_property
    def _ours(self) -> Mask:
        """Whether the heartbeat's seconds and joules per step are of this run's bundle, or of any."""
        bundle = self._said["bundle"]
        return np.asarray(np.isnan(bundle) | (bundle == bundle_number(self.request.bundle)))

    @cached_property
    def step_s(self) -> Column:
        """Seconds per training step: the heartbeat's if it is of this run's bundle, else the history's, else filled."""
        said = np.where(self._ours, self._said["step_us"] / 1e6, np.nan)
        known = filled(self._or_past(said, "step_s", *STEP_S_BOUNDS), UNKNOWN_STEP_S)
        return np.maximum(known, median(known, UNKNOWN_STEP_S) / FASTEST)

    @cached_property
    def step_j(self) -> Column:
        """Joules per training step, from where the seconds come; unknown: the median watts times the seconds."""
        said = np.where(self._ours, self._said["step_uj"] / 1e6, np.nan)
        known = self._or_past(said, "step_j", *STEP_J_BOUNDS)
        watts = filled(known / self.step_s, UNKNOWN_WATTS)
        return np.maximum(watts, median(watts, UNKNOWN_WATTS) / FASTEST) * self.step_s

    @cached_property
    def up_bytes_per_s(self) -> Column:
        """Of the link, as measured by the device."""
        return filled(_within(self._said["up_kbit_s"] * 125.0, 1.0, np.inf), UNKNOWN_BYTES_PER_S)

    @cached_property
    def down_bytes_per_s(self) -> Column:
        """Of the link, as measured by the device."""
        return filled(_within(self._said["down_kbit_s"] * 125.0, 1.0, np.inf), UNKNOWN_BYTES_PER_S)

    @cached_property
    def samples(self) -> Column:
        """Announced for the plan's dataset, else those of the last update; filled."""
        wanted = self.request.plan.dataset
        said = [
            offer[0].samples
            if len(offer) == 1 and offer[0].name == wanted
            else next((entry.samples for entry in offer if entry.name == wanted), None)
            for offer in self._devices.values("state.datasets")
        ]
        known = self._or_past(self._devices.spread(said), "samples", 1.0, LARGEST_SAMPLES)
        return filled(known, UNKNOWN_SAMPLES)

    @cached_property
    def steps(self) -> Column:
        """Steps of the plan's whole job, whole numbers of 1 or more."""
        training = self.request.plan.training
        if training.steps is not None:
            return np.full(self.count, float(training.steps))
        return (training.epochs or 1) * self.pass_steps

    @cached_property
    def pass_steps(self) -> Column:
        """Batches in one pass over the data."""
        training = self.request.plan.training
        used = self.samples * (1.0 - training.holdout_fraction)
        if training.max_samples is not None:
            used = np.minimum(used, training.max_samples)
        return np.maximum(1.0, np.ceil(used / training.batch_size))

    def seconds(self, steps: Column, up_bytes: Column | float | None = None) -> Column:
        """Of a job: model down, steps, update up."""
        up = self.request.up_bytes if up_bytes is None else up_bytes
        transfers = self.request.down_bytes / self.down_bytes_per_s + up / self.up_bytes_per_s
        return transfers + steps * self.step_s

    def joules(self, steps: Column, up_bytes: Column | float | None = None) -> Column:
        """Of a job: steps, and the radio from bytes by the constants of Wi-Fi, or of LTE on a metered link."""
        up = self.request.up_bytes if up_bytes is None else up_bytes
        metered = self._said["link_metered"] == 1.0
        up_j, down_j = (np.where(metered, lte, wifi) for wifi, lte in zip(_WIFI_J, _LTE_J, strict=True))
        return np.asarray(steps * self.step_j + (up * up_j + self.request.down_bytes * down_j) / 1e6)

    def charge_after(self, joules: Column) -> Column:
        """Share of the battery left after a job, under 0 where it would not do; 1 for those that draw on none."""
        left = filled(self.charge, UNKNOWN_CHARGE) - joules / self.capacity_j
        return np.where(self.on_battery, left, 1.0)

    # What the run knows of them.
    @cached_property
    def asked(self) -> Column:
        """Jobs that a device was given."""
        return self._past.column("asked", 0.0)

    @cached_property
    def counted(self) -> Column:
        """Updates that were taken in."""
        return self._past.column("counted", 0.0)

    @cached_property
    def failures(self) -> Column:
        """Of the last jobs, in a row."""
        return np.clip(self._past.column("failures", 0.0), 0.0, 1e3)

    @cached_property
    def fade(self) -> Column:
        """Factor for devices that failed, 1 for others: ``1 / (1 + f)``, and failures are forgotten.

        ``f = failures * 0.5^(age / 10)`` with the rounds since it was asked last: whoever failed has its full weight
        again in time, and is never left out for ever.
        """
        age = np.clip(self.request.round - self.last_round, 0.0, 1e4)
        return np.asarray(1.0 / (1.0 + self.failures * 0.5 ** (age / FORGIVEN_ROUNDS)))

    @cached_property
    def last_round(self) -> Column:
        """When a device was asked last; -1: never."""
        return self._past.column("last_round", -1.0)

    @cached_property
    def loss_rms(self) -> Column:
        """Root of the mean squared loss of the last update; NaN: none yet, or it did not say."""
        return _within(self._past.column("loss_rms"), 0.0, LARGEST_LOSS)

    @cached_property
    def elapsed_s(self) -> Column:
        """From job to update, by the coordinator's clock; NaN before the first."""
        return _within(self._past.column("elapsed_s"), 1e-3, np.inf)

    @cached_property
    def queue_j(self) -> Column:
        """As stored; see :mod:`coordinator.scheduling.energy_queue`."""
        return np.nan_to_num(self._past.column("queue_j", 0.0), posinf=0.0, neginf=0.0)

    def _or_past(self, said: Column, name: str, least: float, most: float) -> Column:
        """What a device said, else what its history has; NaN for what lies outside the bounds."""
        known = _within(said, least, most)
        unknown = np.isnan(known)
        return np.where(unknown, _within(self._past.column(name), least, most), known) if unknown.any() else known

    def has(self, ability: str) -> Mask:
        """Whether devices announced an ability."""
        announced = [ability in abilities for abilities in self._devices.values("state.abilities")]
        return np.asarray(self._devices.spread(announced, 0.0) == 1.0)


def willing(table: Table, marks: Marks) -> Mask:
    """Devices that would not decline every job now; notes the limit of the others.

    One whose last heartbeat is stale waits for its next: what it would say now is not known. One that never sent any
    is let in, and has the last word.
    """
    declines = table.declines.astype(np.int64)
    for code in np.unique(declines[declines != 0]).tolist():
        limit = DECLINES[code] if code < len(DECLINES) else "a limit this version does not know"
        marks.mark(declines == code, f"its owner's limits forbid it now: {limit}")
    if table.stale.any():
        marks.figure("heartbeat_age_s", table.heartbeat_age_s[table.stale], table.stale)
        marks.mark(table.stale, "waits for its heartbeat, the last one is {heartbeat_age_s:.0f} s old")
    return np.asarray((declines == 0) & ~table.stale)


def sits_out(table: Table, marks: Marks) -> Mask:
    """Devices that are left for last this time because they failed: each with the chance ``1 - fade``.

    For selectors that rank devices by something else: so a failing one is there less and less often, and never not
    at all.
    """
    out = np.zeros(table.count, bool)
    failed = np.flatnonzero(table.fade < 1.0)
    if len(failed):
        out[failed] = uniforms(table.request.random, len(failed)) > table.fade[failed]
        marks.figure("fade", table.fade[failed], failed)
    return out


def _within(values: Column, least: float, most: float) -> Column:
    """NaN for what lies outside."""
    return np.where((values >= least) & (values <= most), values, np.nan)
