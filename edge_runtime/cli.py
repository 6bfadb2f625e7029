"""``edge-agent``: the device's command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edge_runtime
from edge_runtime import lean, logs  # noqa: F401 - lean comes before whatever imports msgspec
from edge_runtime.errors import BundleError, ConfigError, DataError, EdgeError

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.agent.limits import Known
    from edge_runtime.bundle.manifest import Manifest

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_EPILOG = """example:
  edge-agent check --config agent.toml
  edge-agent run --config agent.toml

exit codes: 0 ended when asked, 1 failed while running, 2 wrong usage, configuration or data"""


def main(arguments: list[str] | None = None) -> int:
    """Runs ``edge-agent``; gives the exit code."""
    options = _parser().parse_args(arguments)
    logs.set_up(verbose=options.verbose, as_json=options.command == "run" and options.json)
    try:
        result: int = options.action(options)
    except (ConfigError, DataError, BundleError) as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return EXIT_USAGE
    except EdgeError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return EXIT_FAILED
    return result


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="edge-agent", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=edge_runtime.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run the agent until it is stopped",
        description="Runs the agent in the foreground; SIGTERM and SIGINT end it, finished updates wait in the spool.",
        epilog="example:\n  edge-agent run --config agent.toml",
        formatter_class=raw,
    )
    run.add_argument("--json", action="store_true", help="log as JSON lines")
    run.set_defaults(action=_run)
    check = commands.add_parser(
        "check",
        help="check configuration and datasets, without connecting",
        description="Reads the configuration, says which sensor would measure joules and which limits are in force, "
        "opens every dataset and says what it holds. With a bundle every sample is compared with what that takes: "
        "shape, type, labels, NaN.",
        epilog="example:\n  edge-agent check --config agent.toml --bundle digits.bundle --json",
        formatter_class=raw,
    )
    check.add_argument("--bundle", type=Path, help="bundle that is to be trained on the data")
    check.add_argument("--dataset", metavar="NAME", help="check this dataset only")
    check.set_defaults(action=_check)
    quarantine = commands.add_parser(
        "quarantine",
        help="list the bundles that crashed the worker too often, and lift them",
        description="Lists the bundles that this device refuses, since they crashed the worker again and again. Works "
        "whether the agent runs or not.",
        epilog="example:\n  edge-agent quarantine --config agent.toml --lift all",
        formatter_class=raw,
    )
    quarantine.add_argument(
        "--lift", metavar="SHA256|all", help="allow this bundle again; its first 8 digits are enough"
    )
    quarantine.set_defaults(action=_quarantine)
    for command in (check, quarantine):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (run, check, quarantine):
        command.add_argument("--config", type=Path, required=True, help="the agent's configuration (TOML)")
        command.add_argument("--verbose", action="store_true", help="log every step")
    return parser


def _run(options: argparse.Namespace) -> int:
    from edge_runtime.agent.config import load_agent_config
    from edge_runtime.agent.daemon import Agent

    agent = Agent(load_agent_config(options.config))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    from edge_runtime.agent.config import link_settings, load_agent_config
    from edge_runtime.agent.limit_facts import unknown_facts
    from edge_runtime.agent.limits import in_force
    from edge_runtime.data import open_dataset
    from edge_runtime.transport.link import check_tls

    config = load_agent_config(options.config)
    check_tls(link_settings(config))
    chosen = [data for data in config.data if options.dataset in (None, data.name)]
    if not chosen:
        names = ", ".join(data.name for data in config.data)
        raise ConfigError(f"{options.config}: has no dataset {options.dataset!r}; it has {names}")
    manifest = None if options.bundle is None else _manifest(options.bundle)
    _check_state(Path(config.state_dir))
    found = []
    for data in chosen:
        snapshot = open_dataset(data, code_dir=config.code_dir).snapshot()
        found.append({"name": data.name, "samples": len(snapshot)})
        if manifest is not None:
            from edge_runtime.data.view import View, Window

            View(data.name, snapshot, manifest, Window()).check_values()
    fits = {} if manifest is None else {"bundle": manifest.name}
    energy, limits = _energy(config), in_force(config.limits)
    known = _known(config) if limits else None
    warnings = [] if known is None else unknown_facts(known, config.limits, config.telemetry.file)
    if options.json:
        about = {"device": config.device, "broker": config.broker.url, "energy": energy}
        about |= {"limits": limits, "warnings": warnings}
        _print_json({**about, "datasets": found, **fits})
    else:
        print(f"device {config.device}, broker {config.broker.url}")
        for line in _energy_lines(energy, config, known):
            print(f"energy: {line}")
        print(f"limits: {', '.join(limits) or 'none'}")
        for line in warnings:
            print(f"warning: {line}")
        for entry in found:
            fit = "" if manifest is None else f", all fit {manifest.name}"
            print(f"dataset {entry['name']}: {entry['samples']} samples{fit}")
    return EXIT_OK


def _check_state(folder: Path) -> None:
    """Whether `run` could keep its state there; an agent may be running on it.

    Raises:
        EdgeError: no folder, not writable, or written by newer software.
    """
    from edge_runtime.store.spool import Spool

    if (folder / "spool.db").exists():
        Spool(folder, sweep=False).close()
        return
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written" if there.is_dir() else "is no folder"
        raise ConfigError(f"state_dir {folder} cannot be used: {there} {what}; choose another one, or change its owner")


def _known(config: AgentConfig) -> Known:
    """What limits would go by, as far as something here says it."""
    from edge_runtime.agent.conditions import Conditions

    conditions = Conditions(config, clock=time.time, monotonic=time.monotonic, root=Path("/"))
    if config.limits.only_unmetered:
        conditions.connected(_local_host(config))
    return conditions.known({})


def _local_host(config: AgentConfig) -> str | None:
    """This end's address of a connection to the broker, by the routes of this machine; no packet is sent there."""
    import socket

    from edge_runtime.transport.link import parse_url

    address = parse_url(config.broker.url, insecure=config.broker.insecure)
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _energy(config: AgentConfig) -> dict[str, Any]:
    """Which sensor the agent would use, which ones it would not and why, and what its radio costs."""
    from edge_runtime.agent.radio import radio_of
    from edge_runtime.agent.sensing import ROOT, survey
    from energy.metering.way import combined

    found = survey(config.energy, busy_s=time.process_time if config.energy.modelled_of == "agent" else None)
    source = combined([sensor.source for sensor in found.ways[0]]) if found.ways else None
    found.close()
    return {
        "source": None if source is None else {**source._asdict(), "modelled": source.modelled},
        "refused": [refusal._asdict() for refusal in found.refused],
        "radio": radio_of(config.energy, None, ROOT)._asdict(),
    }


def _energy_lines(energy: dict[str, Any], config: AgentConfig, known: Known | None) -> list[str]:
    source, radio = energy["source"], energy["radio"]
    day_told = known is not None and known.rate.step_joules is not None and config.limits.joules_per_day is not None
    if source is None:
        switched_off = config.energy.sensor == "none"
        cure = "switched off" if switched_off else "no sensor, and no watts for a modelled one in [energy]"
        lines = [f"joules are unknown: {cure}"]
        lines += [
            f"limits.{key} will not hold: nothing here can measure"
            for key in ("job_joules", "joules_per_day")
            if getattr(config.limits, key) is not None and not (day_told and key == "joules_per_day")
        ]
    else:
        word = "modelled" if source["modelled"] else f"measured by {source['sensor']} ({source['scope']})"
        lines = [f"{word}: {source['covers']}"]
    if day_told:
        lines.append(f"limits.joules_per_day goes by step_joules, as {config.telemetry.file} says it")
    wanted = ("plug", config.energy.sensor)
    lines += [
        f"refused: {refusal['reason']}"
        for refusal in energy["refused"]
        if refusal["fault"] != "absent" or refusal["sensor"] in wanted
    ]
    up, down = radio["joules_per_mb_up"], radio["joules_per_mb_down"]
    costs = "unknown" if up is None else f"{up:.3g} J per MB up, {down:.3g} down, modelled"
    return [*lines, f"radio: {costs} ({radio['about']})"]


def _manifest(path: Path) -> Manifest:
    from edge_runtime.bundle import Bundle

    if not path.exists():
        raise ConfigError(f"{path} does not exist; name the bundle that edge-export wrote")
    return Bundle.open(path).manifest


def _quarantine(options: argparse.Namespace) -> int:
    from edge_runtime.agent.config import load_agent_config
    from edge_runtime.agent.jobs import CRASH_LIMIT
    from edge_runtime.store.spool import Spool

    state = Path(load_agent_config(options.config).state_dir)
    spool = Spool(state, sweep=False) if (state / "spool.db").exists() else None  # else no agent ever ran here
    crashes = {} if spool is None else spool.all_crashes()
    held = {bundle: count for bundle, count in crashes.items() if count >= CRASH_LIMIT}
    lifted = [] if options.lift is None else _chosen(options.lift, held)
    if spool is not None:
        for bundle in lifted:
            spool.forgive(bundle)
        spool.close()
    left = [{"bundle": bundle, "crashes": count} for bundle, count in held.items() if bundle not in lifted]
    if options.json:
        _print_json({"quarantined": left, "lifted": lifted})
        return EXIT_OK
    for bundle in lifted:
        print(f"lifted: bundle {bundle}")
    for entry in left:
        print(f"bundle {entry['bundle']} crashed the worker {entry['crashes']} times")
    if not left:
        print("no bundle is in quarantine")
    return EXIT_OK


def _print_json(found: dict[str, Any]) -> None:
    import json  # `run` does without it

    print(json.dumps(found))


def _chosen(lift: str, held: dict[str, int]) -> list[str]:
    if lift == "all":
        return list(held)
    found = [bundle for bundle in held if bundle.startswith(lift.lower())]
    if len(lift) < 8 or len(found) != 1:
        names = ", ".join(bundle[:12] for bundle in held) or "none"
        raise ConfigError(f"--lift {lift}: names no bundle in quarantine; give 8 digits or more of one of: {names}")
    return found


if __name__ == "__main__":
    sys.exit(main())
