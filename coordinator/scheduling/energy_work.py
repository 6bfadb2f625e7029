"""What a device can do before the deadline and within its energy: the work that ``energy_aware`` gives it, or none.

Work comes in halves: of the plan's steps, half, a quarter and so on down to ``training.min_steps`` the most is taken
that ends before the deadline and within the joules that are left. A device that cannot even do the least may make one
pass as an anchor, where that is allowed and less; else it is left out. A device whose link is slow, or whose data cap
is nearly used up, sends a smaller update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.budget import LEAST_BYTES
from coordinator.scheduling.draws import Column, Mask, filled, uniforms
from coordinator.scheduling.table import UNKNOWN_CHARGE, Table, willing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.scheduling.notes import Marks

HOUR_S = 3600.0  # that availability is of
DATA_ROUNDS = 20.0  # what is left of a data cap shall do for so many more rounds


class Work(NamedTuple):
    """Per candidate: whether it is in, its steps, whether it is an anchor, its update's bytes, seconds and joules.

    ``full_s``, ``full_j`` are of the whole job, whatever part of it is given: scores compare devices by these, so that
    more charge, and with it more work, never lowers a score.
    """

    ready: Mask
    steps: Column
    anchor: Mask
    up_bytes: Column
    seconds: Column
    joules: Column
    full_s: Column
    full_j: Column


class _Costs:
    """Seconds and joules of jobs of so many steps, with updates of these bytes, and the limits of both."""

    def __init__(self, table: Table, up_bytes: Column, floor: Column) -> None:
        self._table = table
        none = np.zeros(table.count)
        self._link_s, self._link_j = table.seconds(none, up_bytes), table.joules(none, up_bytes)
        self.limit_s = table.request.plan.participation.deadline_s
        charge = filled(table.charge, UNKNOWN_CHARGE)
        above = np.where(table.on_battery, (charge - floor) * table.capacity_j, np.inf)
        self.limit_j = np.minimum(above, np.nan_to_num(table.joules_left, nan=np.inf))

    def of(self, steps: Column) -> tuple[Column, Column]:
        """Seconds and joules."""
        return self._link_s + steps * self._table.step_s, self._link_j + steps * self._table.step_j

    def fit(self, steps: Column) -> Mask:
        """Whether both are within their limits."""
        seconds, joules = self.of(steps)
        return np.asarray((seconds <= self.limit_s) & (joules <= self.limit_j))


def fit_work(table: Table, options: Mapping[str, float], marks: Marks) -> Work:
    """Gates and work of all candidates; notes why a device is left out.

    Options: ``reserve_percent``, ``margin_percent``, ``least_availability``, ``least_temperature_margin_c``,
    ``least_free_memory_mb``, ``upload_share``, ``least_update_share``, ``anchors``.
    """
    up = update_bytes(table, options["upload_share"], options["least_update_share"])
    ready = _gates(table, options, up, marks)
    reserve = np.where(np.isnan(table.reserve), options["reserve_percent"] / 100.0, table.reserve)
    floor = np.asarray(reserve + options["margin_percent"] / 100.0)
    costs = _Costs(table, up, floor)
    steps, fits = _fit_steps(table, costs)
    anchor = np.zeros(table.count, bool)
    if options["anchors"] and not fits.all():
        anchor = ~fits & table.has("anchor") & costs.fit(table.pass_steps)
        steps = np.where(anchor, table.pass_steps, steps)
    seconds, joules = costs.of(steps)
    _explain(table, marks, ready & ~fits & ~anchor, costs=costs, steps=steps, floor=floor)
    ready &= ~_leaving(table, options["least_availability"], seconds, ready & (fits | anchor), marks)
    full = table.steps
    return Work(ready & (fits | anchor), steps, anchor, up, seconds, joules, table.seconds(full), table.joules(full))


def _fit_steps(table: Table, costs: _Costs) -> tuple[Column, Mask]:
    """The most of all steps, half of them, ... down to the plan's least that fits, else the least; whether it fits."""
    training = table.request.plan.training
    least = np.minimum(float(training.min_steps), table.steps)
    train_j = np.inf if training.job_joules is None else training.job_joules
    steps = np.asarray(table.steps)
    while True:
        fits = costs.fit(steps)
        over = (~fits | (steps * table.step_j > train_j)) & (steps > least)
        if not over.any():
            return steps, fits
        steps = np.where(over, np.maximum(np.floor(steps / 2.0), least), steps)


def update_bytes(table: Table, upload_share: float, least_share: float) -> Column:
    """Bytes of each device's update, the least share of the plan's or more.

    Less than the plan's where the upload would take more than its share of the deadline, or where the data cap would
    not do for ``DATA_ROUNDS`` more rounds. Only plans with rate control allow it.
    """
    request = table.request
    uplink, wanted = request.plan.uplink, float(request.up_bytes)
    if (uplink.target_ratio is None and uplink.budget_bytes is None) or wanted <= 0.0:
        return np.full(table.count, wanted)
    by_time = upload_share * request.plan.participation.deadline_s * table.up_bytes_per_s
    by_cap = np.nan_to_num(table.data_left_bytes, nan=np.inf) / DATA_ROUNDS - request.down_bytes
    least = max(min(LEAST_BYTES, wanted), np.ceil(least_share * wanted))
    return np.asarray(np.clip(np.floor(np.minimum(by_time, by_cap)), least, wanted))


def _gates(table: Table, options: Mapping[str, float], up: Column, marks: Marks) -> Mask:
    ready = willing(table, marks)
    bytes_ = up + table.request.down_bytes
    marks.figure("availability", table.availability)
    for wrong, why in (
        (table.free_memory_mb < options["least_free_memory_mb"], "too little free memory"),
        (table.temperature_margin_c < options["least_temperature_margin_c"], "too hot to begin"),
        (table.data_left_bytes < bytes_, "its data cap is used up"),
    ):
        marks.mark(ready & wrong, why)  # NaN is not wrong: what is unknown is left to the device
        ready &= ~wrong
    return ready


def _leaving(table: Table, least: float, seconds: Column, ready: Mask, marks: Marks) -> Mask:
    """Who is likely to leave before its job ends: probably there for less of the next hour than the job takes.

    A device that is mostly off knows little of the hour in which it is on for once. So of these, too, some are let in:
    one whose likelihood is half of the least that is called for, half of the times.
    """
    there = np.nan_to_num(table.availability, nan=1.0)
    doubtful = np.flatnonzero(ready & (there < least) & (there * HOUR_S < seconds))
    out = np.zeros(table.count, bool)
    if len(doubtful):
        out[doubtful] = uniforms(table.request.random, len(doubtful)) >= there[doubtful] / least
        marks.mark(out, "is likely to leave (availability {availability:.0%})")
    return out


def _explain(table: Table, marks: Marks, out: Mask, *, costs: _Costs, steps: Column, floor: Column) -> None:
    if not out.any():
        return
    seconds, joules = costs.of(steps)
    after = table.charge_after(joules)
    marks.figure("left_j", table.joules_left)
    marks.figure("floor", floor[out], out)
    marks.mark(out, "would draw {joules:.0f} J, and {left_j:.0f} J are left for today")
    late = out & (seconds > costs.limit_s)
    marks.mark(late, f"would need {{seconds:.0f}} s of {costs.limit_s:.0f} s even for the least work")
    low = out & table.on_battery & (after < floor)
    marks.mark(low, "battery {charge_after:.0%} after the job would be under {floor:.0%}")
