"""When a device may not train: heat, battery, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.agent.config import MB

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.messages import Telemetry


class Unhealthy(NamedTuple):
    """Why no training may run now. ``keeps_work``: what runs may end after its step and send what it reached."""

    reason: str
    keeps_work: bool = True


def unhealthy(measured: Telemetry, config: AgentConfig) -> Unhealthy | None:
    """What forbids training now, by the limits of the configuration; None when it may run. The most urgent first."""
    limits = config.limits
    heat, battery, free = measured.temperature_c, measured.battery_percent, measured.free_memory_bytes
    if limits.min_free_memory_mb is not None and free is not None and free < limits.min_free_memory_mb * MB:
        short = f"{free / MB:.0f} MB of free memory is under limits.min_free_memory_mb = {limits.min_free_memory_mb:g}"
        return Unhealthy(short, keeps_work=False)  # to encode takes memory too
    if limits.max_temperature_c is not None and heat is not None and heat > limits.max_temperature_c:
        return Unhealthy(f"{heat:.0f} degrees C is over limits.max_temperature_c = {limits.max_temperature_c:g}")
    plugged = measured.on_external_power is True
    least = limits.min_battery_percent
    if least is not None and battery is not None and not plugged and battery < least:
        return Unhealthy(f"battery at {battery:.0f} % is under limits.min_battery_percent = {least:g}")
    return None
