"""``edge-coordinator serve``: from the command line to the server's settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime import logs


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the server."""
    parser.add_argument("--broker", metavar="URL", help="mqtt://host:port or mqtts://... (default: start one here)")
    parser.add_argument("--port", type=_port, default=0, help="port of the broker started here (default: any free one)")
    parser.add_argument(
        "--embedded", choices=("mosquitto", "amqtt"), default="mosquitto", help="broker to start, if it is installed"
    )
    parser.add_argument("--name", default="coordinator", help="MQTT client id (default: coordinator)")
    parser.add_argument("--username", help="user name at the broker")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="file that holds the password")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="certificate authority of the broker")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="our certificate")
    parser.add_argument("--key", type=Path, metavar="FILE", help="our private key")
    parser.add_argument("--insecure", action="store_true", help="allow mqtt:// to other hosts: models unencrypted")
    parser.add_argument(
        "--workers",
        type=_count,
        default=0,
        metavar="N",
        help="processes that check updates and sum them (default: 0, threads of the server do)",
    )
    parser.add_argument("--json", action="store_true", help="log as JSON lines")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step")


def serve(options: argparse.Namespace) -> int:
    """Runs the server until it is interrupted."""
    from coordinator.server import serve as run_server
    from coordinator.settings import ServerSettings

    settings = ServerSettings(
        state_dir=options.state,
        database_url=options.database,
        broker_url=options.broker,
        broker_port=options.port,
        embedded=options.embedded,
        name=options.name,
        username=options.username,
        password_file=options.password_file,
        ca=options.ca,
        certificate=options.certificate,
        key=options.key,
        insecure=options.insecure,
        workers=options.workers,
    )
    logs.set_up(verbose=options.verbose, as_json=options.json)
    run_server(settings)
    return 0


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; take 1 to 65535, or 0 for any free one")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes; take 0 to 1024")
    return int(text)
