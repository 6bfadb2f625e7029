"""A table of one vector per device with the sum of its rows, for AFA-CS and FedAMD."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.aggregation.base import Contribution, Round, State, Sums, Vector

SUM, REST, ROWS = "sum", "rest", "rows"
_BLOCK = 1 << 16  # elements: they stay in the cache


def empty(size: int) -> State:
    """The state of a table without rows: their sum, what float64 rounded off it, and their number."""
    import numpy as np

    return {SUM: np.zeros(size, np.float64), REST: np.zeros(size, np.float64), ROWS: np.zeros(1, np.int64)}


def replace(round_: Round, state: State, rows: Iterable[tuple[str, Vector]]) -> State:
    """Puts rows (device, float32 ``[size]``) into the round's table and gives the state after them.

    The sum changes by the new row minus the old one, and what rounding lost of it is carried along (Knuth, "The Art of
    Computer Programming" 2, 4.2.2, theorem B). So a row that leaves takes all with it that it brought, to about 100
    bits below the largest number that was ever in the sum.
    """
    import numpy as np

    total, rest = state[SUM].copy(), state[REST].copy()
    count = int(state[ROWS][0])
    for device, row in rows:
        before = round_.table.get(device)
        round_.table.put(device, row)
        if before is None:
            count += 1
        else:
            _add(total, rest, before, -1.0)
        _add(total, rest, row, 1.0)
    return {SUM: total, REST: rest, ROWS: np.array([count], np.int64)}


def mean(state: State, count: int) -> Sums:
    """The sum of the rows over ``count``, float64 ``[size]``."""
    result: Sums = (state[SUM] + state[REST]) / count
    return result


def newest(contributions: Iterable[Contribution]) -> list[Contribution]:
    """One update of each device, the newest, in the order of the devices' names."""
    found: dict[str, Contribution] = {}
    for entry in contributions:
        other = found.get(entry.update.device)
        if other is None or _age(entry) >= _age(other):
            found[entry.update.device] = entry
    return [found[device] for device in sorted(found)]


def _age(entry: Contribution) -> tuple[int, int]:
    return entry.meta.model_version, entry.update.sequence


def _add(total: Sums, rest: Sums, row: Vector, sign: float) -> None:
    """``total += sign * row`` in place, with what the rounding lost added to ``rest``; a block at a time."""
    for start in range(0, len(total), _BLOCK):
        part = slice(start, start + _BLOCK)
        before, added = total[part].copy(), row[part] * sign
        total[part] += added
        back = total[part] - before
        rest[part] += (before - (total[part] - back)) + (added - back)
