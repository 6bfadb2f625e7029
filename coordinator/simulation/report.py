"""What came of a simulated run, for people and programs. All joules are of the device model, not measured."""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.simulation.settings import StepSource
from edge_runtime.messages import Role


class Joules(msgspec.Struct, kw_only=True):
    """Modelled joules. ``training`` above idle, ``radio`` of all bytes, ``idle_wait`` the idle power of devices while
    they had a job. ``wasted``: that part of all three which went into jobs whose update does not count, into trainings
    that were broken off, and into transfers that were.
    """

    training: float = 0.0
    radio: float = 0.0
    idle_wait: float = 0.0
    wasted: float = 0.0

    @property
    def total(self) -> float:
        """Training, radio and idle."""
        return self.training + self.radio + self.idle_wait


class VersionReport(msgspec.Struct, kw_only=True):
    """One model version; 0 is the initial one. Joules, bytes and counts are those of the run until it was made.

    ``loss`` and ``accuracy`` are of the plan's test set, None where it was not evaluated. ``trained`` are jobs that
    devices finished (device-rounds).
    """

    version: int
    virtual_s: float
    updates: int = 0
    late_updates: int = 0
    loss: float | None = None
    accuracy: float | None = None
    modelled_joules: Joules
    trained: int = 0
    counted: int = 0
    lost_to_battery: int = 0
    bytes_up: float = 0.0
    bytes_down: float = 0.0


class DeviceReport(msgspec.Struct, kw_only=True):
    """One device: assignments it was given, and what became of them; times its battery came down to the reserve."""

    device: str
    asked: int = 0
    counted: int = 0
    refused: int = 0
    failed: int = 0
    declined: int = 0
    cancelled: int = 0
    modelled_joules: float = 0.0
    lost_to_battery: int = 0
    samples: int = 0
    final_loss: float | None = None
    final_accuracy: float | None = None


class AssignmentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One job, in the order in which they were given.

    ``steps`` None: epochs of the plan. ``version``: of the model that it began from. ``sequence``: counts the jobs of
    a standing assignment, else 0. ``outcome``: as in the report's ``outcomes``.
    """

    round: int
    device: str
    steps: int | None
    role: Role
    version: int
    assignment: str
    sequence: int
    outcome: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Of a run that goes on: its newest version, and ``trained``, jobs that devices finished."""

    version: int
    virtual_s: float
    wall_s: float
    trained: int


class SimulationReport(msgspec.Struct, kw_only=True):
    """A whole run. The same plan, traces, settings and seed give the same report but for ``wall_s``.

    ``status``: finished; failed, as the coordinator says it; stopped, by the caller or at the limit of virtual time; or
    stalled: nothing would have come of it any more. ``reason`` has it in words.
    ``outcomes`` counts jobs by their end: counted, refused, failed, declined, cancelled, open. ``faults`` counts those
    that struck. ``final_model_sha256`` names the last model's blob, ``final_vector_sha256`` the shared model that
    devices hold, with a lossy downlink. ``verified_versions`` were built again from the stored updates, bit for bit
    (only where the plan retains all updates).
    """

    run: str
    status: str
    reason: str
    plan: str
    seed: int
    devices: int
    step_s: float
    step_source: StepSource
    training: bool
    virtual_s: float = 0.0
    wall_s: float = 0.0
    trained: int = 0
    lost_to_battery: int = 0
    modelled_joules: Joules
    outcomes: dict[str, int] = {}
    faults: dict[str, int] = {}
    events: int = 0
    server_steps: int = 0
    final_model_sha256: str = ""
    final_vector_sha256: str | None = None
    verified_versions: int = 0
    versions: list[VersionReport] = []
    device_reports: list[DeviceReport] = []
    assignments: list[AssignmentReport] = []

    @property
    def device_rounds_per_s(self) -> float:
        """Jobs that devices finished, per second of this machine."""
        return self.trained / self.wall_s if self.wall_s else 0.0

    @property
    def jain(self) -> float:
        """Jain's index of counted updates per device: 1 where all have as many (Jain et al., DEC-TR-301, 1984)."""
        counts = [device.counted for device in self.device_reports]
        squares = sum(count * count for count in counts)
        return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0

    @property
    def wasted_fraction(self) -> float:
        """Share of all modelled joules that went into jobs whose update does not count."""
        total = self.modelled_joules.total
        return self.modelled_joules.wasted / total if total else 0.0


def as_json(report: SimulationReport) -> dict[str, Any]:
    """One object, with what is derived."""
    found: dict[str, Any] = msgspec.to_builtins(report)
    return {
        **found,
        "device_rounds_per_s": report.device_rounds_per_s,
        "jain": report.jain,
        "wasted_fraction": report.wasted_fraction,
    }


def as_text(report: SimulationReport, *, rows: int = 12) -> str:
    """A table of versions, every n-th so that there are about ``rows``, and a summary."""
    lines = [
        "version    virtual time  updates  late  accuracy    loss  modelled joules  wasted  lost to battery",
    ]
    shown = report.versions
    every = max(1, -(-len(shown) // rows))
    for at, version in enumerate(shown):
        if at % every and at != len(shown) - 1:
            continue
        joules = version.modelled_joules
        wasted = joules.wasted / joules.total if joules.total else 0.0
        accuracy = "-" if version.accuracy is None else f"{100 * version.accuracy:.1f} %"
        loss = "-" if version.loss is None else f"{version.loss:.3f}"
        lines.append(
            f"{version.version:7}  {_time(version.virtual_s):>14}  {version.updates:7}  {version.late_updates:4}  "
            f"{accuracy:>8}  {loss:>6}  {joules.total:15.1f}  {100 * wasted:4.1f} %  {version.lost_to_battery:15}"
        )
    if every > 1:
        lines.append(
            f"(every {_ordinal(every)} of {len(shown)} versions; updates and late are of that version alone, joules "
            "and devices lost of the run until then)"
        )
    joules = report.modelled_joules
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()) if count)
    end = f"{report.run} {report.status}{': ' + report.reason if report.reason else ''}"
    lines += ["", f"{end} after {_time(report.virtual_s)} of virtual time, {report.wall_s:.1f} s here"]
    contributed = sum(one.counted > 0 for one in report.device_reports)
    lines.append(
        f"devices: {report.devices}, of which {contributed} contributed (Jain {report.jain:.2f}); "
        f"{report.lost_to_battery} times one was lost to its battery"
    )
    lines.append(f"a step of the reference device: {1000 * report.step_s:.10g} ms ({report.step_source})")
    lines.append(f"jobs: {counts or 'none'}; {report.trained} trained, {report.device_rounds_per_s:.0f} a second")
    parts = f"training {joules.training:.1f}, radio {joules.radio:.1f}, idle while at work {joules.idle_wait:.1f}"
    lines.append(
        f"from the device model: {joules.total:.1f} J ({parts}), {100 * report.wasted_fraction:.1f} % of it wasted"
    )
    accuracies = sorted(one.final_accuracy for one in report.device_reports if one.final_accuracy is not None)
    if accuracies:
        mean, tenth = sum(accuracies) / len(accuracies), accuracies[len(accuracies) // 10]
        lines.append(
            f"on the data of every device: accuracy {100 * mean:.1f} % on average over {len(accuracies)} devices, "
            f"{100 * tenth:.1f} % at the worst tenth, {100 * accuracies[0]:.1f} % at the worst"
        )
    if report.faults:
        struck = ", ".join(f"{count} {name}" for name, count in sorted(report.faults.items()))
        lines.append(f"faults: {struck}; every update had one verdict, and none counted twice")
    if report.verified_versions:
        lines.append(f"{report.verified_versions} versions built again from their updates, bit for bit")
    return "\n".join(lines)


def as_progress(progress: Progress) -> str:
    """A line for people who wait."""
    return (
        f"{_time(progress.virtual_s)} of virtual time: version {progress.version}, {progress.trained} jobs trained, "
        f"{progress.wall_s:.0f} s here"
    )


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _time(seconds: float) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{int(hours)} h {int(rest // 60):02} min" if hours else f"{int(rest // 60)} min {rest % 60:04.1f} s"
