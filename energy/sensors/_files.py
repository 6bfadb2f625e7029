"""Reading small files of the kernel, often and cheaply, and small commands, rarely.

A file stays open: one ``pread`` at offset 0 makes sysfs compute the value anew. A device that was taken away answers
with an error, or with nothing; then the file is opened once more, in case its driver was only loaded again.
"""

from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING

from energy.errors import Fault, SensorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from energy.sensors.base import Sensor

_FORBIDDEN = (errno.EACCES, errno.EPERM)
_NUMBER_BYTES = 64
_TEXT_BYTES = 4096  # a page, the most an attribute of sysfs holds
_COMMAND_LIMIT_S = 5.0


def fault_of(error: OSError, otherwise: Fault = "vanished") -> Fault:
    """``permission`` if the kernel said so, else ``otherwise``."""
    return "permission" if error.errno in _FORBIDDEN else otherwise


class KernelFile:
    """A file of the kernel, opened when it is first read and kept open; ``sensor`` names it in errors."""

    __slots__ = ("_cure", "_descriptor", "_known", "_path", "_sensor")

    def __init__(self, path: Path, sensor: str, cure: str = "run as a user that may read it") -> None:
        self._path, self._sensor, self._cure = str(path), sensor, cure
        self._descriptor = -1
        self._known = False  # whether it could be read before

    def text(self) -> str:
        """All of it, as it is now.

        Raises:
            SensorError: ``absent``, ``vanished`` or ``permission``.
        """
        return self._bytes(_TEXT_BYTES).decode(errors="replace")

    def number(self) -> int:
        """The integer it holds now.

        Raises:
            SensorError: ``absent``, ``vanished`` or ``permission``; ``implausible`` if it holds no integer.
        """
        data = self._bytes(_NUMBER_BYTES)
        try:
            return int(data)
        except ValueError as error:
            message = f"{self._sensor}: {self._path} holds {data[:20]!r} in place of a whole number; see dmesg"
            raise SensorError("implausible", message) from error

    def close(self) -> None:
        """Gives the descriptor back; reading again opens the file again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _bytes(self, size: int) -> bytes:
        if self._descriptor >= 0:
            try:
                data = os.pread(self._descriptor, size, 0)
            except OSError:  # gone, loaded again, or a bus error: the second try tells which
                data = b""
            if data:
                return data
            self.close()
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._descriptor, size, 0)
        except OSError as error:
            fault = fault_of(error, "vanished" if self._known else "absent")
            cure = self._cure if fault == "permission" else "see dmesg for its driver"
            message = f"{self._sensor}: {self._path} cannot be read ({error.strerror}); {cure}"
            raise SensorError(fault, message) from error
        if not data:
            raise SensorError("vanished", f"{self._sensor}: {self._path} holds nothing; see dmesg for its driver")
        self._known = True
        return data


def close_all(files: Iterable[KernelFile]) -> None:
    """Closes every one of them."""
    for file in files:
        file.close()


def unexpected(sensor: Sensor, error: Exception) -> SensorError:
    """What a sensor raised against its contract, as a fault of that sensor: nothing of it may end its reader."""
    name = sensor.source.sensor
    message = f"{name}: reading failed with {type(error).__name__} ({error}); choose another sensor, and report this"
    return SensorError("implausible", message)


def watts_within(watts: float, limit_watts: float, what: str) -> float:
    """``watts`` if that can be the power of something that runs: finite, above 0 and at most ``limit_watts``.

    Raises:
        SensorError: ``implausible``.
    """
    if not (math.isfinite(watts) and 0 < watts <= limit_watts):
        message = f"{what} reads {watts:g} W, outside 0-{limit_watts:g} W; check its driver, or choose another sensor"
        raise SensorError("implausible", message)
    return watts


def look(path: Path) -> str | None:
    """Stripped text of a small file; None where it is absent, forbidden, or refuses to be read now."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return None


def look_number(path: Path) -> int | None:
    """Integer in a small file; None where there is none to be had."""
    text = look(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def board_model(root: Path) -> str:
    """What the device tree calls this board; empty where there is no device tree (x86)."""
    return look(root / "proc/device-tree/model") or look(root / "sys/firmware/devicetree/base/model") or ""


def run_command(arguments: Sequence[str]) -> str:
    """Standard output of a short command.

    Raises:
        FileNotFoundError: there is no such program.
        PermissionError: it may not be started, or says that something is not allowed.
        OSError: it failed or took longer than 5 s; the message is what it said.
    """
    import subprocess

    try:
        done = subprocess.run(
            list(arguments), capture_output=True, text=True, errors="replace", timeout=_COMMAND_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{arguments[0]} did not answer within {_COMMAND_LIMIT_S:g} s") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        said = lines[0]
        code = (
            errno.EACCES
            if "permission" in " ".join(lines).lower() or "can't open device" in said.lower()
            else errno.EIO
        )
        raise OSError(code, said)  # OSError makes a PermissionError of EACCES
    return done.stdout
