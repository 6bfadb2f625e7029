"""Installs the device's package, and only what it needs, into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import MB

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Install:
    """An environment: its interpreter, and the MB (10^6) that the package and its dependencies take."""

    python: str
    size_mb: float


def install(folder: Path, version: str) -> Install | None:
    """A new environment in ``folder`` with Python ``version`` (as "3.11"); None if that Python is not here."""
    python = _find_python(version)
    if python is None:
        return None
    _run([python, "-m", "venv", str(folder)])
    before = _site_mb(folder)
    inside = str(folder / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"  # a copy: building must not leave anything in the checkout
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    _run([*pip, "-c", str(ROOT / "scripts" / "constraints.txt"), str(source)])
    return Install(inside, _site_mb(folder) - before)


def _site_mb(folder: Path) -> float:
    files = [path for path in (folder / "lib").rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files) / MB


def _find_python(version: str) -> str | None:
    if sys.version.startswith(version + "."):
        return sys.executable
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], check=False, capture_output=True).returncode == 0:
        return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = sorted(root.glob(f"versions/{version}.*/bin/python"))
    return str(candidates[-1]) if candidates else None


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
