"""What a simulation is told beside plan and traces."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

START_UNIX_S = 1_767_225_600.0  # 2026-01-01 00:00 UTC, when every simulation begins
STALLED_S = 30 * 86_400.0  # of virtual time without a new version
CHUNK_BYTES = 96 * 1024
StepSource: TypeAlias = Literal["given", "measured", "assumed"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the virtual world; the defaults are those of the command.

    ``seed`` is of everything that the world draws: partition, echoes, faults. The plan has its own, of selection and
    training. ``step_s`` is what one training step takes on the reference device, of which the traces say by how much
    each device is slower; ``step_source`` says where that comes from. ``samples`` has a device whose trace says
    nothing, where no data is given.

    Where ``leaving`` is "ends", a device that goes stops its agent, and what it had not finished is lost; with
    "continues" it only loses its connection. With ``keep_reserve`` owners have told their agents the reserve of the
    trace (``limits.battery_reserve_percent``), so they decline jobs that would go below it; else an agent takes them,
    and the device is lost when it is down to its reserve. With ``free_steps`` devices with a standing assignment choose
    any number of steps each time, else the most that they can afford. With ``told_step`` agents know from the start
    what a step takes, as from the file of ``[telemetry]``; else once they have trained. Before the run begins, devices
    have watched their own presence for ``history_days``.

    ``limit_s`` ends the run after so much virtual time; without it a run that makes no version for ``STALLED_S`` has
    stalled, and ends. ``device_accuracy``: at the end the final model is evaluated on
    the data of every device.
    """

    seed: int = 0
    step_s: float = 0.01
    step_source: StepSource = "given"
    samples: int = 100
    heartbeat_interval_s: float = 50.0
    tick_s: float = 1.0
    leaving: Literal["ends", "continues"] = "ends"
    keep_reserve: bool = False
    free_steps: bool = False
    told_step: bool = False
    history_days: float = 7.0
    limit_s: float | None = None
    device_accuracy: bool = False
