"""``edge-energy``: what this machine draws, and what the layers of a model cost on it."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import EnergyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
GROUP = "energy.commands"


class Command(NamedTuple):
    """A command: its module is imported when it is called.

    The module has ``DESCRIPTION``, ``EXAMPLE``, ``add_arguments(parser)`` and ``run(options) -> exit code``. A module
    of another package also has ``SUMMARY``, a few words for the list of commands.
    """

    name: str
    module: str
    summary: str


COMMANDS = (
    Command("sensors", "energy.commands.sensors", "list the sensors of this machine, and why others cannot be read"),
    Command("watch", "energy.commands.watch", "show power live"),
    Command("measure", "energy.commands.measure", "run a command and say what it drew"),
    Command("calibrate", "energy.commands.calibrate", "fit the modelled sensor to one that measures"),
    Command("profile", "energy.commands.profile", "measure what layers cost on this device, from a probe pack"),
    Command("fit", "energy.commands.fit", "fit models to a profile that was only measured"),
    Command("predict", "energy.commands.predict", "what a training step of a bundle will cost, layer by layer"),
    Command("report", "energy.commands.report", "a profile or the ledger of a run as a page, CSV and JSON"),
)

_DESCRIPTION = "What this machine draws, and what the layers of a model cost on it."
_EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted; measure passes its command's on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``edge-energy``; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        _parser().parse_args(given)  # help, version or an error: all of these exit
    try:
        module = _module(given[0])
        return _run(given[0], module, given[1:])
    except UsageError as error:
        print(f"edge-energy: {error}", file=sys.stderr)
        return EXIT_USAGE
    except EnergyError as error:
        print(f"edge-energy: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        return EXIT_FAILED


def _run(name: str, module: Any, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"edge-energy {name}",
        description=module.DESCRIPTION,
        epilog=f"example:\n{module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    result: int = module.run(parser.parse_args(arguments))
    return result


def _module(name: str) -> Any:
    for command in COMMANDS:
        if command.name == name:
            return importlib.import_module(command.module)
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except ImportError as error:
            raise UsageError(f"{name}: cannot be loaded ({error}); install what it needs") from error
    names = [command.name for command in COMMANDS] + sorted(point.name for point in entry_points(group=GROUP))
    raise UsageError(f"no command {name!r}; there are {', '.join(names)}")


def _summary(point: EntryPoint) -> str:
    """What a command of another package does, or where it is from if it does not say so or cannot be loaded."""
    try:
        return str(point.load().SUMMARY)
    except (ImportError, AttributeError):
        return f"from {point.value}"


def _parser() -> argparse.ArgumentParser:
    rows = [f"  {command.name:<11}{command.summary}" for command in COMMANDS]
    own = {command.name for command in COMMANDS}
    rows += sorted(
        f"  {point.name:<11}{_summary(point)}" for point in entry_points(group=GROUP) if point.name not in own
    )
    text = "\n".join(
        ["commands:", *rows, "", "example:", "  edge-energy sensors", "  edge-energy measure -- sleep 5", ""]
    )
    parser = argparse.ArgumentParser(
        prog="edge-energy",
        usage="edge-energy COMMAND [--help] ...",
        description=_DESCRIPTION,
        epilog=f"{text}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", metavar="COMMAND", help="one of those below; each has --help")
    return parser


def _version() -> str:
    try:
        return version("edge-training-runtime")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
