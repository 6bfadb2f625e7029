"""What every benchmark prints last: one JSON object with arguments, machine, versions and flat results."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("edge-training-runtime", "numpy", "onnxruntime", "paho-mqtt", "msgspec", "sqlalchemy", "torch", "amqtt")
MB = 1e6


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = os.environ.get("EDGE_DATA") or str(Path(__file__).resolve().parents[2] / "shared" / "data")
    result.add_argument("--data", type=Path, default=Path(default), help="folder of the data sets")
    return result


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "Model")):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": round(psutil.virtual_memory().total / MB),
        "system": f"{platform.system()} {platform.release()}",
    }


def print_report(benchmark: str, arguments: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Prints the report; every result gets every key that any of them has."""
    keys = list(dict.fromkeys(key for result in results for key in result))
    report = {
        "benchmark": benchmark,
        # Folders are of one machine and say nothing.
        "arguments": {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)},
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "results": [{key: result.get(key) for key in keys} for result in results],
    }
    print(json.dumps(report, indent=1))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
