"""What a simulation is told beside plan and traces."""

from __future__ import annotations

from typing import Literal

import msgspec

START_UNIX_S = 1_767_225_600.0  # 2026-01-01 00:00 UTC, when every simulation begins
CHUNK_BYTES = 96 * 1024


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the virtual world; the defaults are those of the command.

    ``seed`` is of everything that the world draws: partition, echoes, faults. The plan has its own, of selection and
    training. ``step_s`` is what one training step takes on the reference device, of which the traces say by how much
    each device is slower. ``samples`` has a device whose trace says nothing, where no data is given. Where ``leaving``
    is "ends", a device that goes stops its agent, and what it had not finished is lost; with "continues" it only loses
    its connection. ``limit_s`` ends the run after so much virtual time. ``device_accuracy``: at the end the final model
    is evaluated on the data of every device.
    """

    seed: int = 0
    step_s: float = 0.01
    samples: int = 100
    heartbeat_interval_s: float = 60.0
    tick_s: float = 1.0
    leaving: Literal["ends", "continues"] = "ends"
    limit_s: float | None = None
    device_accuracy: bool = False
