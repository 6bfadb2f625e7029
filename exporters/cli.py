"""``edge-export``: bundles from the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import EdgeError
from exporters import _inspect
from exporters.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HYPER = ("lr", "momentum", "weight_decay", "beta1", "beta2", "eps", "clip_norm")

_EXTRA = ("torch", "onnx", "onnxscript")

_BUNDLE_HELP = """\
Exports what a function returns. MODULE:FUNCTION is imported from the current directory or the environment; the
function takes no arguments and returns one of
  a torch.nn.Module                  (then give --input-shape)
  (module, example_input)            example_input: tensor or array with a batch axis
  a dict of exporters.export_bundle's keyword arguments, at least module and example_input
Options given here win over the dict.

example:
  edge-export bundle examples.model_zoo:lenet -o lenet.bundle --optimizer sgd --lr 0.05
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``edge-export``; returns the exit code: 0 done, 1 the model was refused, 2 wrong usage or input."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        code: int = arguments.run(arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except EdgeError as error:
        return _fail(str(error), 1)
    return code


def _fail(message: str, code: int) -> int:
    print(f"edge-export: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-export",
        description="Turns a torch module into a bundle that devices train without torch.",
        epilog="example: edge-export bundle examples.model_zoo:lenet -o lenet.bundle",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_bundle(commands)
    _add_inspect(commands)
    _add_probes(commands)
    return parser


def _add_bundle(commands: Any) -> None:
    parser = commands.add_parser(
        "bundle",
        help="export a module as a bundle",
        description=_BUNDLE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="MODULE:FUNCTION", help="function that builds the model")
    parser.add_argument("-o", "--output", required=True, type=Path, help="bundle to write")
    parser.add_argument("--name", help="name of the model (default: the function's)")
    parser.add_argument("--loss", help="cross_entropy, binary_cross_entropy_with_logits or mean_squared_error")
    parser.add_argument("--optimizer", help="sgd, adam or adamw (default: sgd)")
    for name in _HYPER:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="NUMBER", help=f"default of {name} on the device")
    parser.add_argument("--batch", type=_batch, help="auto (default), dynamic, or a number of samples")
    parser.add_argument(
        "--trainable", action="append", metavar="PREFIX", help="train only these parameters; repeatable"
    )
    parser.add_argument("--labels", type=_words, metavar="A,B,C", help="names of the classes")
    parser.add_argument("--input-shape", type=_shape, metavar="1,28,28", help="shape of one sample, without the batch")
    parser.add_argument("--input-dtype", choices=("float32", "int64"), default="float32")
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison of training steps with torch")
    parser.add_argument("--json", action="store_true", help="print a machine-readable report")
    parser.set_defaults(run=_bundle)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="check a bundle and print what it holds",
        description="Checks every file and graph as a device would, and prints the manifest.",
        epilog="example: edge-export inspect lenet.bundle",
    )
    parser.add_argument("file", type=Path, help="bundle to read")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.set_defaults(run=_inspect_command)


def _add_probes(commands: Any) -> None:
    parser = commands.add_parser(
        "probes",
        help="make a probe pack: what a device measures to learn what layers cost",
        description="Traces every layer of some bundles alone, with other sizes of the same kinds beside them, into one"
        " file for edge-energy profile. Bundles share what they have in common.",
        epilog="example: edge-export probes lenet.bundle har.bundle -o layers.probes",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="whose layers are probed")
    parser.add_argument("-o", "--output", required=True, type=Path, help="probe pack to write")
    parser.add_argument("--per-kind", type=int, default=40, metavar="N", help="other sizes per kind (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the other sizes (default: 0)")
    parser.add_argument("--batch", type=_samples, default=32, metavar="N", help="samples per step (default: 32)")
    parser.add_argument("--json", action="store_true", help="print a machine-readable report")
    parser.set_defaults(run=_probes_command)


def _samples(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples")
    return int(text)


def _batch(text: str) -> str | int:
    if text in {"auto", "dynamic"}:
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, dynamic nor a number of samples")
    return int(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write for example 1,28,28") from None
    if any(size < 1 for size in shape):
        raise argparse.ArgumentTypeError(f"{text!r} has a size below 1")
    return shape


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Names the extra where a library of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        cure = 'pip install "edge-training-runtime[export]"'
        raise UsageError(f"exporting needs {error.name}, which is not installed: {cure}") from error


def _bundle(arguments: argparse.Namespace) -> int:
    with _extra():
        from exporters import _source
        from exporters.export import export_bundle

    given = _source.load(arguments.source, arguments.input_shape, arguments.input_dtype)
    options = {
        key: getattr(arguments, key)
        for key in ("name", "loss", "optimizer", "batch", "trainable", "labels")
        if getattr(arguments, key) is not None
    }
    hyper = {key: getattr(arguments, key) for key in _HYPER if getattr(arguments, key) is not None}
    options["hyper"] = {**given.pop("hyper", {}), **hyper}
    if arguments.no_parity:
        options["parity"] = False
    given = {**given, **options}
    report = export_bundle(**given, path=arguments.output, progress=lambda line: print(f"{line} ...", file=sys.stderr))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report) | {"path": str(report.path), "batch": _plain(report.batch)}))
    else:
        print(_inspect.report_text(report))
    return 0


def _probes_command(arguments: argparse.Namespace) -> int:
    with _extra():
        from exporters.probes import export_probes

    report = export_probes(
        arguments.bundles,
        arguments.output,
        per_kind=arguments.per_kind,
        seed=arguments.seed,
        batch=arguments.batch,
        progress=lambda line: print(f"{line} ...", file=sys.stderr),
    )
    if arguments.json:
        print(json.dumps(report._asdict() | {"path": str(report.path)}))
    else:
        print(_inspect.probes_text(report))
    return 0


def _plain(struct: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(struct)


def _inspect_command(arguments: argparse.Namespace) -> int:
    from edge_runtime.bundle import Bundle
    from edge_runtime.errors import BundleError

    if not arguments.file.exists():
        raise UsageError(f"{arguments.file} does not exist")
    try:
        bundle = Bundle.open(arguments.file)
        bundle.verify()
    except BundleError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps({"sha256": bundle.sha256, "manifest": _plain(bundle.manifest)}))
    else:
        print(_inspect.manifest_text(bundle.manifest, bundle.sha256))
    return 0


if __name__ == "__main__":
    sys.exit(main())
