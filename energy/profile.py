"""``energy-profile.json``: what the layers of one device cost, measured, and the models fitted to it.

One file per device and power mode. Unknown fields are ignored, wrong ones refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from energy.errors import ProfileError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "edge-energy-profile"
FORMAT_VERSION = 1

# What a step costs. Only ``joules`` was measured by a power sensor; ``modelled_joules`` come from utilisation or
# nominal watts; ``cpu_seconds`` stand in where there is neither; ``seconds`` are wall time, for the time model.
Quantity: TypeAlias = Literal["joules", "modelled_joules", "cpu_seconds", "seconds"]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one step: the mean of ``repeats`` bursts, and the relative standard error of that mean."""

    mean: float
    relative_error: float
    repeats: int = 1


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One layer that was measured alone; sizes as in :mod:`energy.layers`, costs per step."""

    sizes: dict[str, int]
    costs: dict[Quantity, Cost]


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """A Gaussian process on the logarithm of a cost; its points are those of the family.

    ``parameters`` are named by :mod:`energy.process`; ``spread`` widens its standard deviations so that intervals
    cover what they promise, found by leaving points out.
    """

    parameters: dict[str, list[float]]
    spread: float = 1.0


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """All points of one kind of layer, and a fitted model per quantity."""

    kind: str
    points: list[Point]
    fitted: dict[Quantity, Fitted] = {}


class Sensed(msgspec.Struct, frozen=True, kw_only=True):
    """The sensor of the profile's joules; see :class:`energy.sensors.base.Source`."""

    sensor: str
    scope: str
    quality: str
    covers: str


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Where the profile holds: another device, power mode or number of threads needs another profile."""

    name: str
    board: str
    cpu: str
    power_mode: str | None = None
    threads: int = 1
    software: dict[str, str] = {}


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model that was metered beside the layers: ``measured`` per step, and what was predicted for it.

    ``low`` and ``high`` bound the 90 % interval. An ``anchor`` set the profile's factor, so it proves nothing.
    """

    model: str
    quantity: Quantity
    batch: int
    measured: float
    predicted: float
    low: float
    high: float
    anchor: bool = False


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """Mean power over one stretch of the profiling, for pictures."""

    at_s: float
    watts: float


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """One window of the profiling, for pictures."""

    name: str
    start_s: float
    end_s: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was learned about one device. ``quantity`` is the one to report: the best that could be had.

    ``fixed`` is the cost of a step that no layer explains (a run of an empty graph). ``factor`` corrects whole models
    by an anchor, and ``factor_error`` is its relative standard error, shared by all predictions.
    """

    device: Device
    quantity: Quantity
    families: list[Family]
    fixed: dict[Quantity, float]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created_unix_s: float = 0.0
    profiling_seconds: float = 0.0
    sensed: Sensed | None = None
    factor: dict[Quantity, float] = {}
    factor_error: dict[Quantity, float] = {}
    idle_watts: float | None = None
    wholes: list[Whole] = []
    power: list[Sample] = []
    windows: list[Mark] = []
    notes: list[str] = []


class _Header(msgspec.Struct):
    format: str = ""
    format_version: int = 0


def load_profile(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        ProfileError: unreadable, no profile, a newer version, or a field of the wrong type.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); name a file that edge-energy wrote") from error
    try:
        header = msgspec.json.decode(data, type=_Header)
    except msgspec.MsgspecError as error:
        raise ProfileError(f"{path}: is no energy profile ({error}); make one with edge-energy profile") from error
    if header.format != FORMAT:
        raise ProfileError(f"{path}: has format {header.format!r}, not {FORMAT!r}; make one with edge-energy profile")
    if header.format_version > FORMAT_VERSION:
        raise ProfileError(
            f"{path}: profile format {header.format_version} is newer than this software reads ({FORMAT_VERSION}); "
            "update edge-training-runtime on this machine"
        )
    try:
        return msgspec.json.decode(data, type=Profile)
    except msgspec.MsgspecError as error:
        raise ProfileError(f"{path}: is damaged: {error}; profile the device again") from error


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as indented JSON; the file is whole or not there.

    Raises:
        ProfileError: it cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
