"""What a profile holds for: the machine, its processor, its power mode and the software that runs the steps."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from energy.metering.conditions import read_conditions
from energy.thor.profile import Device

_BOARDS = ("proc/device-tree/model", "sys/class/dmi/id/product_name")
_PACKAGES = ("onnxruntime", "numpy")


def describe(threads: int, root: Path = Path("/")) -> Device:
    """This machine; ``root`` as for sensors."""
    board = next(filter(None, (_text(root / name) for name in _BOARDS)), "unknown")
    return Device(
        name=platform.node() or "unknown",
        board=board,
        cpu=_cpu(root) or platform.processor() or platform.machine(),
        power_mode=read_conditions(root).power_mode,
        threads=threads,
        software={"system": f"{platform.system()} {platform.release()}", **_versions()},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _cpu(root: Path) -> str:
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Model", "Hardware"}:
            return value.strip()
    return ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
