"""Several runs of one command: which of them count, and their means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from energy.commands.figures import measurement_json, modelled_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.metering.measurement import Measurement

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T_95 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09),
)
_FIGURES = ("joules", "net_joules", "watts", "idle_watts")


class Run(NamedTuple):
    """One run of the command."""

    measurement: Measurement
    cpu_seconds: float
    exit_code: int


def run_json(run: Run) -> dict[str, Any]:
    """All of one run."""
    return {**measurement_json(run.measurement), "cpu_seconds": run.cpu_seconds, "exit_code": run.exit_code}


def counted(runs: Sequence[Run]) -> list[Run]:
    """Those that nothing speaks against; all of them if there is no such."""
    return [run for run in runs if run.measurement.valid] or list(runs)


def left_out(runs: Sequence[Run]) -> str:
    """What a reader of the means has to know of the runs that are not in them, or should not be; mostly nothing."""
    if len(runs) < 2 or all(run.measurement.valid for run in runs):
        return ""
    good = sum(run.measurement.valid for run in runs)
    if good:
        return f"{len(runs) - good} of {len(runs)} runs have problems and are left out of the means"
    return f"all {len(runs)} runs have problems, so all of them are in the means"


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """The mean of runs and half of its 95 % interval (Student's t); None for a single run."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    t = _T_95[count - 2] if count - 2 < len(_T_95) else 2.09
    return mean, t * deviation / count**0.5


def means(runs: Sequence[Run]) -> dict[str, Any]:
    """Means of the runs that count, each with half of its 95 % interval, and of their rails.

    A figure is None that one of them lacks; so are all of joules and watts where they are of several sources.
    """
    counting = counted(runs)
    rows = [run_json(run) for run in counting]
    same = len({run.measurement.source for run in counting}) == 1
    result: dict[str, Any] = {}
    for name in (*_FIGURES, *map(modelled_name, _FIGURES), "seconds", "cpu_seconds"):
        values = [row[name] for row in rows]
        if (same or name in ("seconds", "cpu_seconds")) and all(value is not None for value in values):
            result[name], result[f"{name}_half_width"] = mean_and_half_width(values)
        else:
            result[name] = result[f"{name}_half_width"] = None
    rails = [row["rails_joules"] for row in rows] if same else [{}]
    shared = [name for name in rails[0] if all(name in rail for rail in rails)]
    result["rails_joules"] = {name: sum(rail[name] for rail in rails) / len(rails) for name in shared}
    return result
