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
from coordinator.scheduling.draws import Column, Mask, filled
from coordinator.scheduling.table import UNKNOWN_CHARGE, Table, willing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.scheduling.notes import Marks

LEAST_UPDATE = 0.25  # of the plan's bytes
DATA_ROUNDS = 20.0  # what is left of a data cap shall do for so many more rounds


class Work(NamedTuple):
    """Per candidate: whether it is in, its steps, whether it is an anchor, and the bytes of its update.

    ``full_s``, ``full_j`` are of the whole job, whatever part of it is given: scores compare devices by these, so that
    more charge, and with it more work, never lowers a score.
    """

    ready: Mask
    steps: Column
    anchor: Mask
    up_bytes: Column
    full_s: Column
    full_j: Column


def fit_work(table: Table, options: Mapping[str, float], marks: Marks) -> Work:
    """Gates and work of all candidates; notes why a device is left out.

    Options: ``reserve_percent``, ``margin_percent``, ``least_availability``, ``least_temperature_margin_c``,
    ``least_free_memory_mb``, ``upload_share``, ``anchors``.
    """
    up = update_bytes(table, options["upload_share"])
    ready = _gates(table, options, up, marks)
    limit_s = table.request.plan.participation.deadline_s
    floor = _floor(table, options)
    limit_j = _joules_limit(table, floor)
    steps = fit_steps(table, up, limit_s, limit_j)
    fits = (table.seconds(steps, up) <= limit_s) & (table.joules(steps, up) <= limit_j)
    anchor = np.zeros(table.count, bool)
    if options["anchors"] and not fits.all():
        one = table.pass_steps
        anchor = ~fits & table.has("anchor")
        anchor &= (table.seconds(one, up) <= limit_s) & (table.joules(one, up) <= limit_j)
        steps = np.where(anchor, one, steps)
    _explain(table, marks, ready & ~fits & ~anchor, steps=steps, up=up, limit_s=limit_s, floor=floor)
    full = table.steps
    return Work(ready & (fits | anchor), steps, anchor, up, table.seconds(full), table.joules(full))


def fit_steps(table: Table, up: Column, limit_s: float, limit_j: Column) -> Column:
    """The most of all steps, half of them, ... down to the plan's least that is within both limits, else the least."""
    training = table.request.plan.training
    least = np.minimum(float(training.min_steps), table.steps)
    train_j = training.job_joules if training.job_joules is not None else np.inf
    steps = table.steps.copy()
    while True:
        over = (table.seconds(steps, up) > limit_s) | (table.joules(steps, up) > limit_j)
        over |= steps * table.step_j > train_j
        over &= steps > least
        if not over.any():
            return steps
        steps = np.where(over, np.maximum(np.floor(steps / 2.0), least), steps)


def update_bytes(table: Table, upload_share: float) -> Column:
    """Bytes of each device's update, ``LEAST_UPDATE`` of the plan's or more.

    Less than the plan's where the upload would take more than its share of the deadline, or where the data cap would
    not do for ``DATA_ROUNDS`` more rounds. Only plans with rate control allow it.
    """
    request = table.request
    uplink, wanted = request.plan.uplink, float(request.up_bytes)
    if (uplink.target_ratio is None and uplink.budget_bytes is None) or wanted <= 0.0:
        return np.full(table.count, wanted)
    by_time = upload_share * request.plan.participation.deadline_s * table.up_bytes_per_s
    by_cap = np.nan_to_num(table.data_left_bytes, nan=np.inf) / DATA_ROUNDS - request.down_bytes
    least = max(min(LEAST_BYTES, wanted), np.ceil(LEAST_UPDATE * wanted))
    return np.asarray(np.clip(np.floor(np.minimum(by_time, by_cap)), least, wanted))


def _gates(table: Table, options: Mapping[str, float], up: Column, marks: Marks) -> Mask:
    ready = willing(table, marks)
    bytes_ = up + table.request.down_bytes
    marks.figure("availability", table.availability)
    for wrong, why in (
        (table.free_memory_mb < options["least_free_memory_mb"], "too little free memory"),
        (table.temperature_margin_c < options["least_temperature_margin_c"], "too hot to begin"),
        (table.availability < options["least_availability"], "is likely to leave (availability {availability:.0%})"),
        (table.data_left_bytes < bytes_, "its data cap is used up"),
    ):
        marks.mark(ready & wrong, why)  # NaN is not wrong: what is unknown is left to the device
        ready &= ~wrong
    return ready


def _floor(table: Table, options: Mapping[str, float]) -> Column:
    """The share of the battery that must be left."""
    reserve = np.where(np.isnan(table.reserve), options["reserve_percent"] / 100.0, table.reserve)
    return np.asarray(reserve + options["margin_percent"] / 100.0)


def _joules_limit(table: Table, floor: Column) -> Column:
    """What a job may draw: what the owner allows today, and what the battery has above its reserve."""
    charge = filled(table.charge, UNKNOWN_CHARGE)
    above = np.where(table.on_battery, (charge - floor) * table.capacity_j, np.inf)
    return np.minimum(above, np.nan_to_num(table.joules_left, nan=np.inf))


def _explain(
    table: Table, marks: Marks, out: Mask, *, steps: Column, up: Column, limit_s: float, floor: Column
) -> None:
    if not out.any():
        return
    seconds, joules = table.seconds(steps, up), table.joules(steps, up)
    after = table.charge_after(joules)
    marks.figure("least_s", seconds[out], out)
    marks.figure("least_j", joules[out], out)
    marks.figure("left_j", table.joules_left)
    marks.figure("least_charge_after", after[out], out)
    marks.figure("floor", floor[out], out)
    marks.mark(out, "would draw {least_j:.0f} J, and {left_j:.0f} J are left for today")
    marks.mark(out & (seconds > limit_s), f"would need {{least_s:.0f}} s of {limit_s:.0f} s even for the least work")
    low = table.on_battery & (after < floor)
    marks.mark(out & low, "battery {least_charge_after:.0%} after the job would be under {floor:.0%}")
