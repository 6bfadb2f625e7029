"""What a device announces of itself, retained: the coordinator assigns only what is in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import edge_runtime
from edge_runtime import messages, telemetry
from edge_runtime.agent.config import MB

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.agent.jobs import Capabilities

ABILITIES = ["anchor", "standing"]
NEWS = 0.1  # of a count of samples or a battery's capacity: a smaller change need not be announced


def announcement(
    config: AgentConfig,
    can: Capabilities,
    *,
    online: bool,
    instance: str,
    session: int,
    samples: dict[str, int],
    energy: messages.EnergySource | None,
    battery_wh: float | None,
) -> messages.DeviceState:
    """The announcement of connection number ``session`` of this process; ``samples`` by dataset, as counted last."""
    return messages.DeviceState(
        device=config.device,
        online=online,
        session=f"{instance}-{os.getpid()}-{session}",
        instance=instance,
        software=edge_runtime.__version__,
        platform=telemetry.machine(),
        codecs=sorted(can.codecs),
        methods=sorted(can.methods),
        backends=["onnxruntime"],
        datasets=[messages.DatasetInfo(name=name, samples=samples.get(name)) for name in sorted(can.datasets)],
        limits=messages.Limits(
            blob_bytes=can.blob_limit_bytes,
            worker_memory_bytes=int((config.limits.worker_memory_mb or 0) * MB),
        ),
        energy=energy,
        abilities=list(ABILITIES),
        battery_wh=battery_wh,
    )


def is_news(told: dict[str, float], now: dict[str, float]) -> bool:
    """Whether figures that were announced became known, or changed by over a tenth."""
    return any(name not in told or abs(value - told[name]) > NEWS * told[name] for name, value in now.items())
