"""How much a device is worth asking: the score of ``energy_aware``, a product of factors that each are explained.

Every factor is bounded, and so is the product of those that rest on what devices say of themselves: no lie, and no
set of lies together, makes a device more than four times as likely as the median one. None of them grows with less
battery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.scheduling.draws import Column, Rows, clipped, median, quantile
from coordinator.scheduling.energy_queue import queue_now

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.scheduling.energy_work import Work
    from coordinator.scheduling.table import Table

UTILITY_BOUND = 4.0  # times the median
ENERGY_BOUND = 16.0  # times the median, and down to its inverse
LEAST_HEADROOM = 0.02
LEAST_UTILITY = 0.05
CLAIM_BOUND = 4.0  # times the median: of all that a device says of itself, together


def utility(table: Table, rows: Rows) -> Column:
    """Samples times rms loss over the greatest, 0.05 to 1; Oort's, clipped to its 95 % value and four times its median.

    NaN where the loss is not known.
    """
    worth = (table.samples * table.loss_rms)[rows]
    bound = UTILITY_BOUND * median(worth, 0.0)
    bounded = np.minimum(clipped(worth), bound if bound > 0.0 else np.inf)
    greatest = np.nanmax(bounded) if np.isfinite(bounded).any() else 0.0
    share = bounded / greatest if greatest > 0.0 else np.where(np.isnan(bounded), np.nan, 1.0)
    return np.asarray(np.maximum(share, LEAST_UTILITY))


def speed(seconds: Column, share: float, exponent: float) -> Column:
    """``(T / t)^exponent`` for those slower than the quantile ``T`` of all, else 1."""
    limit = quantile(seconds, share)
    return np.where(seconds > limit, (limit / seconds) ** exponent, 1.0)


def thrift(table: Table, joules: Column, rows: Rows, options: Mapping[str, float]) -> Column:
    """``(E_median / E)^energy_exponent``; joules of devices on mains count ``mains_weight`` times."""
    weight = np.where(table.on_battery, 1.0, options["mains_weight"])[rows]
    drawn = joules[rows]
    ratio = median(drawn, 1.0) / np.maximum(drawn * weight, 1e-12)
    return np.asarray(np.clip(ratio, 1.0 / ENERGY_BOUND, ENERGY_BOUND) ** options["energy_exponent"])


def headroom(table: Table, work: Work, rows: Rows, options: Mapping[str, float]) -> Column:
    """What the whole job would leave above the reserve, over ``headroom``, from 0.02 to 1; 1 on mains."""
    reserve = np.where(np.isnan(table.reserve), options["reserve_percent"] / 100.0, table.reserve)
    above = (table.charge_after(work.full_j) - reserve) / options["headroom"]
    return np.where(table.on_battery, np.clip(above, LEAST_HEADROOM, 1.0), 1.0)[rows]


def factors(table: Table, work: Work, rows: Rows, options: Mapping[str, float]) -> dict[str, Column]:
    """The factors of the score by name, of these candidates; ``score`` is their product.

    ``bound`` is what keeps the product of those that rest on claims (utility, speed, thrift, headroom) within
    ``CLAIM_BOUND`` times its median.
    """
    round_ = table.request.round
    age = np.maximum(round_ - table.last_round[rows], 0.0)
    queue = queue_now(table.queue_j[rows], table.request.memory)
    patience = options["queue_jobs"] * max(median(work.full_j[rows], 1.0), 1e-9)
    claims = {
        "utility": utility(table, rows),
        "speed": speed(work.full_s[rows], options["speed_quantile"], options["speed_exponent"]),
        "thrift": thrift(table, work.full_j, rows, options),
        "headroom": headroom(table, work, rows, options),
    }
    claimed = _product(claims, len(rows))
    parts = {
        **claims,
        "bound": np.minimum(1.0, CLAIM_BOUND * median(claimed, 1.0) / np.maximum(claimed, 1e-300)),
        "age": 1.0 + np.sqrt(np.minimum(age / max(round_, 1), 1.0)),
        "participation": (1.0 + table.counted[rows]) ** -0.5,
        "queue": 1.0 / (1.0 + queue / patience),
        "fade": table.fade[rows],
    }
    return {"score": _product(parts, len(rows)), **parts}


def _product(parts: Mapping[str, Column], count: int) -> Column:
    product = np.ones(count)
    for part in parts.values():
        product = product * part
    return product


def even_weights(table: Table, work: Work, rows: Rows, options: Mapping[str, float]) -> Column:
    """Weights of the other half: ``E^-energy_exponent / (1 + n)``, less after failures, those never asked included."""
    cheap = thrift(table, work.full_j, rows, options)
    return np.asarray(cheap / (1.0 + table.counted[rows]) * table.fade[rows])
