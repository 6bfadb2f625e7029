"""``edge-coordinator``: serve, submit plans, look at runs, fetch models.

Exit codes: 0 done; 1 it failed (a run that failed, a model that does not verify, a server that cannot run); 2 wrong
usage or input (command line, plan, bundle, test set); 3 no such run; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.errors import PluginError, UnknownRunError
from edge_runtime.errors import BundleError, ConfigError, DataError, EdgeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAILED, WRONG_INPUT, UNKNOWN_RUN, INTERRUPTED = 1, 2, 3, 130
_EXTRA = ("amqtt", "onnx", "sqlalchemy")  # what the extra "coordinator" installs
_EPILOG = "exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 no such run, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one line per exit code
    """Runs one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        cure = 'pip install "edge-training-runtime[coordinator]"'
        return _fail(f"{error.name} is not installed; the coordinator needs its extra: {cure}", WRONG_INPUT)
    except UnknownRunError as error:
        return _fail(error, UNKNOWN_RUN)
    except (ConfigError, BundleError, DataError, PluginError) as error:
        return _fail(error, WRONG_INPUT)
    except EdgeError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def _fail(error: EdgeError | str, code: int) -> int:
    print(f"edge-coordinator: {error}", file=sys.stderr)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``command`` to its function."""
    from coordinator import cli_commands as commands
    from coordinator import cli_serve, cli_simulate, cli_status

    parser = argparse.ArgumentParser(
        prog="edge-coordinator", description="Federated training: the server's side.", epilog=_EPILOG
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        name: str,
        command: Callable[[argparse.Namespace], int],
        about: str,
        example: str,
        *,
        json: bool = True,
        store: bool = True,
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"example:\n  {example}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if store:
            _add_store(sub)
        if json:
            sub.add_argument("--json", action="store_true", help="print one JSON value for machines")
        sub.set_defaults(command=command)
        return sub

    cli_serve.arguments(
        add(
            "serve",
            cli_serve.serve,
            "run the coordinator until interrupted",
            "edge-coordinator serve --state edge-state --port 1883",
            json=False,
        )
    )
    sub = add("submit", commands.submit, "store a run for the server", "edge-coordinator submit plan.toml --watch")
    sub.add_argument("plan", type=Path, help="the plan, a TOML file")
    sub.add_argument("--watch", action="store_true", help="then show its progress until it has ended")
    sub = add("status", cli_status.status, "show runs, rounds and devices", "edge-coordinator status digits-1 --watch")
    sub.add_argument("run", nargs="?", help="the run (default: the latest)")
    sub.add_argument("--watch", action="store_true", help="follow the run until it has ended")
    add("runs", cli_status.runs, "list all runs", "edge-coordinator runs --json")
    add("devices", cli_status.devices, "list the devices", "edge-coordinator devices")
    sub = add(
        "explain",
        commands.explain,
        "say why each device was chosen for a round, or not",
        "edge-coordinator explain digits-1 3 --device device-a",
    )
    sub.add_argument("run", help="the run")
    sub.add_argument("round", type=_round, help="the round, counted from 1; of the last 100")
    sub.add_argument("--device", metavar="NAME", help="only this device")
    sub = add("model", commands.model, "write a trained model to a file", "edge-coordinator model digits-1 -o out.onnx")
    sub.add_argument("run", help="the run")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="FILE.onnx or FILE.safetensors")
    sub.add_argument("--version", type=int, metavar="N", help="model version, 0 is the initial one (default: latest)")
    sub = add("stop", commands.stop, "end a run; what it has stays", "edge-coordinator stop digits-1 --reason enough")
    sub.add_argument("run", help="the run")
    sub.add_argument("--reason", default="stopped by the user", help="what status shows")
    sub = add(
        "verify",
        commands.verify,
        "build every model of a run again from the stored updates and compare",
        "edge-coordinator verify digits-1",
    )
    sub.add_argument("run", help="the run; its plan must say retain_updates = 'all'")
    cli_simulate.arguments(
        add(
            "simulate",
            cli_simulate.simulate,
            "run a plan on a virtual fleet, in virtual time",
            "edge-coordinator simulate plan.toml --devices 1000 --data train.npz --partition dirichlet:0.3",
            store=False,
        )
    )
    return parser


def _add_store(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--state",
        type=Path,
        default=Path(os.environ.get("EDGE_STATE") or "edge-state"),
        metavar="DIR",
        help="state folder (default: $EDGE_STATE, else ./edge-state)",
    )
    sub.add_argument(
        "--database",
        default=os.environ.get("EDGE_DATABASE") or None,
        metavar="URL",
        help="database elsewhere, as postgresql+psycopg://... (default: $EDGE_DATABASE, else SQLite in DIR)",
    )


def _round(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no round; they count from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
