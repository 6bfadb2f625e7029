"""Options that say which sensors a command uses, and the ways of measuring they come to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from energy.errors import SensorError, UsageError
from energy.sensors.discovery import SETTINGS, Found, Refusal, choose, discover
from energy.sensors.plug_parser import KINDS

if TYPE_CHECKING:
    import argparse

    from energy.sensors.base import Sensor


MOST_WATTS = 10_000.0  # of a model


class Ways(NamedTuple):
    """What is there, and which of it to use, best first."""

    found: Found
    ways: list[tuple[Sensor, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`open_ways` reads."""
    group = parser.add_argument_group("sensors")
    group.add_argument(
        "--sensor", default="auto", metavar="NAME", help="a name from edge-energy sensors, auto (the best) or none"
    )
    group.add_argument("--model", type=Path, metavar="FILE", help="fall back on this calibration, labelled as modelled")
    group.add_argument("--idle-watts", type=float, metavar="W", help="in place of --model: of the machine without load")
    group.add_argument("--busy-watts", type=float, metavar="W", help="and with all its cores busy; modelled, nominal")
    group.add_argument("--plug", metavar="KIND:TOPIC", help=f"a smart plug; KIND is one of {', '.join(KINDS)}")
    group.add_argument("--broker", metavar="URL", help="the plug's broker, as mqtt://host:1883 or mqtts://host")
    group.add_argument("--user", metavar="NAME", help="user at the broker")
    group.add_argument("--password-file", type=Path, metavar="FILE", help="its password")
    group.add_argument("--ca-file", type=Path, metavar="FILE", help="certificate authority of an mqtts broker")
    group.add_argument("--channel", type=int, default=0, metavar="N", help="of a plug with several, from 0")
    group.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="look up files of the system below")


def open_ways(options: argparse.Namespace, *, everything: bool = False) -> Ways:
    """Looks for sensors by reading them. Sensors that no way uses are closed, unless ``everything`` is wanted.

    Raises:
        UsageError: options that do not fit together, or a sensor that is not there.
    """
    found = discover(options.root)
    extra, refused = [], []
    try:
        for make in (_plug, _modelled):
            try:
                sensor = make(options)
            except SensorError as error:
                refused.append(Refusal(make.__name__.strip("_"), error.fault, str(error)))
            else:
                extra += [sensor] if sensor is not None else []
        found = Found((*found.sensors, *extra), (*found.refused, *refused))
        ways = choose(found, options.sensor)
    except UsageError:
        close_all((*found.sensors, *extra))
        raise
    if not everything:
        for refusal in refused if ways else ():  # without any way the command says so, with the reasons
            print(f"edge-energy: {refusal.reason}", file=sys.stderr)
        used = {id(sensor) for way in ways for sensor in way}
        close_all(tuple(sensor for sensor in found.sensors if id(sensor) not in used))
    return Ways(found, ways)


def close_all(sensors: tuple[Sensor, ...]) -> None:
    """Closes them."""
    for sensor in sensors:
        sensor.close()


def worth_telling(refusal: Refusal) -> bool:
    """Whether it is of a sensor that is there, or that options asked for, so that a user expects it."""
    return refusal.fault != "absent" or refusal.sensor in SETTINGS


def why_none(found: Found) -> str:
    """One line for a user whose machine has no sensor that can be read."""
    reasons = [
        f"{sensor.source.sensor} measures {sensor.source.covers}: --sensor {sensor.source.sensor} takes it all the same"
        for sensor in found.sensors
        if sensor.domain == "gpu"
    ]
    reasons += [refusal.reason for refusal in found.refused if worth_telling(refusal)]
    cures = (
        "use a smart plug (--plug); or, for modelled joules, a calibration (--model) or --idle-watts and --busy-watts"
    )
    return f"no sensor of power or energy can be read here{''.join(f'; {reason}' for reason in reasons)}; {cures}"


def _plug(options: argparse.Namespace) -> Sensor | None:
    if options.plug is None:
        return None
    from energy.sensors.plug import Plug, PlugSettings

    kind, colon, topic = options.plug.partition(":")
    if kind not in KINDS or not colon or not topic:
        raise UsageError(f"--plug {options.plug}: write KIND:TOPIC with KIND one of {', '.join(KINDS)}")
    if options.broker is None:
        raise UsageError("--plug needs --broker, as mqtt://host:1883")
    return Plug(
        PlugSettings(options.broker, kind, topic, options.channel, options.user, options.password_file, options.ca_file)
    )


def _modelled(options: argparse.Namespace) -> Sensor | None:
    idle_watts, busy_watts = options.idle_watts, options.busy_watts
    if (idle_watts is None) != (busy_watts is None):
        raise UsageError("--idle-watts and --busy-watts belong together; give both")
    if options.model is None and idle_watts is None:
        return None
    if options.model is not None and idle_watts is not None:
        raise UsageError("--model brings its own watts; leave out --idle-watts and --busy-watts")
    from energy.metering.calibration import load_calibration
    from energy.sensors.modelled import Modelled, machine_busy_s

    if idle_watts is not None:
        if not 0 <= idle_watts < busy_watts < MOST_WATTS:
            raise UsageError(
                f"--idle-watts {idle_watts:g} and --busy-watts {busy_watts:g} cannot be; "
                f"give 0 <= idle < busy < {MOST_WATTS:g}"
            )
        return Modelled(idle_watts, busy_watts, machine_busy_s(options.root))
    model = load_calibration(options.model)
    fitted_to = f"{model.sensor} ({model.scope}: {model.covers})"
    return Modelled(
        model.idle_watts, model.busy_watts, machine_busy_s(options.root), cores=model.cores, fitted_to=fitted_to
    )
