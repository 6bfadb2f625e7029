"""``edge-energy sensors``: what there is to measure with, read once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from energy.commands import ways
from energy.commands.figures import conditions_json, conditions_line
from energy.errors import SensorError
from energy.metering.conditions import read_conditions
from energy.sensors.discovery import ranked

if TYPE_CHECKING:
    import argparse

    from energy.sensors.base import Sensor
    from energy.sensors.discovery import Refusal

DESCRIPTION = """Lists every sensor of power or energy that answers a real read, best first, with what it covers.
Sensors that are there and cannot be read are listed with the reason. Ends with 1 if nothing can be read."""
EXAMPLE = "  edge-energy sensors\n  edge-energy sensors --plug tasmota:desk --broker mqtt://192.168.1.2 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--all", action="store_true", help="name also the sensors that this machine does not have")
    ways.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the list."""
    found = ways.open_ways(options, everything=True).found
    order = {id(sensor): place for place, way in reversed(list(enumerate(ranked(found.sensors)))) for sensor in way}
    rows, refused = [], [refusal for refusal in found.refused if options.all or ways.worth_telling(refusal)]
    for sensor in sorted(found.sensors, key=lambda sensor: order.get(id(sensor), len(order))):
        try:
            rows.append(_row(sensor))
        except SensorError as error:
            rows.append(_row(sensor, error))
        if id(sensor) not in order:
            rows[-1]["only_by_name"] = True
    ways.close_all(found.sensors)
    conditions = read_conditions(options.root)
    if options.json:
        entries = [refusal._asdict() for refusal in refused]
        print(json.dumps({"sensors": rows, "refused": entries, "conditions": conditions_json(conditions)}, indent=1))
    else:
        _print(rows, refused, ways.why_none(found) if not rows else "", conditions_line(conditions))
    return 0 if rows else 1


def _row(sensor: Sensor, error: SensorError | None = None) -> dict[str, Any]:
    values = sensor.read() if error is None else ()
    rails = []
    for number, rail in enumerate(sensor.rails):
        value = values[number] if number < len(values) else None
        modelled = rail.scope == "modelled"
        unit = f"modelled_{rail.unit}" if modelled else rail.unit
        rails.append({"name": rail.name, "scope": rail.scope, "in_total": rail.in_total, unit: value})
    return {
        **sensor.source._asdict(),
        "domain": sensor.domain,
        "only_by_name": False,
        "interval_s": sensor.interval_s,
        "fault": None if error is None else str(error),
        "rails": rails,
    }


def _print(rows: list[dict[str, Any]], refused: list[Refusal], none: str, conditions: str) -> None:
    for row in rows:
        what = "no sensor" if row["quality"] == "modelled" else f"{row['quality']} of the {row['scope']}"
        print(f"{row['sensor']}: {what} ({row['domain']}), every {row['interval_s']:g} s")
        print(f"  covers {row['covers']}")
        if row["only_by_name"]:
            print(f"  says nothing of what the CPU draws, so it is used only if named: --sensor {row['sensor']}")
        if row["fault"]:
            print(f"  fails now: {row['fault']}")
        for rail in row["rails"]:
            unit = next(key for key in rail if key.endswith(("watts", "joules")))
            value = "-" if rail[unit] is None else f"{rail[unit]:.3f} {'W' if unit.endswith('watts') else 'J'}"
            label = " modelled" if unit.startswith("modelled") else ""
            print(f"  {rail['name']:<24}{value:>16}{label}{'' if rail['in_total'] else '  (not in the total)'}")
    if none:
        print(none)
    for refusal in refused:
        print(f"not usable: {refusal.reason}" + ("" if ways.worth_telling(refusal) else " (absent)"))
    if conditions:
        print(f"now: {conditions}")
