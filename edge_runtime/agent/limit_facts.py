"""Limits that the owner set and whose fact is unknown here: what that means, and the cure, one line each. Pure.

Where work in doubt costs the owner (bytes, a battery that was to be charged) every job is declined until the fact is
known; what stands for a danger that may not be there at all (no battery, no thermometer) does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.agent.limits import Known


def unknown_facts(known: Known, limits: LimitsConfig, telemetry_file: str | None) -> list[str]:
    """What to warn the owner of; ``telemetry_file`` is the one that ``[telemetry]`` names already."""

    def by_file(key: str) -> str:
        if telemetry_file is None:
            return f"let a script of yours say {key}, in the file that [telemetry] file names"
        return (
            f"{telemetry_file}, which [telemetry] file names, does not say {key} either: let your script write it there"
        )

    found = []
    if limits.only_when_charging and known.on_external_power is None:
        cure = by_file("on_external_power")
        found.append(
            "limits.only_when_charging declines every job: nothing here says whether external power is connected; "
            f"{cure}"
        )
    if limits.only_unmetered and known.link_metered is None:
        found.append(
            "limits.only_unmetered declines every job: nothing here says whether the link is metered; set metered = "
            "true or false in [link]"
        )
    if limits.battery_reserve_percent is not None and known.battery_percent is None:
        cure = by_file("battery_percent")
        found.append(
            f"limits.battery_reserve_percent does not hold: no battery can be read here; if there is one, {cure}"
        )
    if limits.max_temperature_c is not None and known.temperature_c is None:
        cure = by_file("temperature_c")
        found.append(f"limits.max_temperature_c does not hold: no thermometer can be read here; {cure}")
    if limits.hours is not None and known.local is None:
        found.append("limits.hours does not hold: the clock was never set; set up time synchronisation")
    return found
