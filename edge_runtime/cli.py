"""``edge-agent``: the device's command line."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from pathlib import Path

import edge_runtime
from edge_runtime.errors import ConfigError, EdgeError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_EPILOG = """example:
  edge-agent check --config agent.toml
  edge-agent run --config agent.toml

exit codes: 0 ended when asked, 1 failed while running, 2 wrong usage or configuration"""


def main(arguments: list[str] | None = None) -> int:
    """Runs ``edge-agent``; gives the exit code."""
    options = _parser().parse_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        result: int = options.action(options)
    except ConfigError as error:
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
    run.set_defaults(action=_run)
    check = commands.add_parser(
        "check",
        help="check configuration and datasets, without connecting",
        description="Reads the configuration, opens every dataset and says what it holds.",
        epilog="example:\n  edge-agent check --config agent.toml --json",
        formatter_class=raw,
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(action=_check)
    for command in (run, check):
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
    from edge_runtime.agent.config import load_agent_config
    from edge_runtime.data import open_dataset

    config = load_agent_config(options.config)
    found = [{"name": data.name, "samples": len(open_dataset(data).snapshot())} for data in config.data]
    if options.json:
        print(json.dumps({"device": config.device, "broker": config.broker.url, "datasets": found}))
    else:
        print(f"device {config.device}, broker {config.broker.url}")
        for entry in found:
            print(f"dataset {entry['name']}: {entry['samples']} samples")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
