"""``energy-profile.json``: what the layers of one device cost, measured, and the models fitted to it.

One file per device and power mode. Unknown fields are ignored, wrong ones refused by name: every number has bounds far
beyond what was ever measured, so that no file can make arithmetic overflow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec

from energy.errors import ProfileError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "edge-energy-profile"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 512 << 20
MAX_SIZE = 10**12  # of one dimension of a layer
MAX_SPREAD = 1e3

# Text in one line: names stand in messages.
Name = Annotated[str, msgspec.Meta(max_length=500, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=253402300799)]  # the end of the year 9999
_Bound = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
_Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
_Watts = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]

# What a step costs. Only ``joules`` was measured by a power sensor; ``modelled_joules`` come from utilisation or
# nominal watts; ``cpu_seconds`` stand in where there is neither; ``seconds`` are wall time, for the time model.
Quantity: TypeAlias = Literal["joules", "modelled_joules", "cpu_seconds", "seconds"]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one step: the mean of ``repeats`` bursts, and the relative standard error of that mean."""

    mean: Amount
    relative_error: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    repeats: Count = 1


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One layer that was measured alone; sizes as in :mod:`energy.thor.layers`, costs per step."""

    sizes: dict[Name, Size]
    costs: dict[Quantity, Cost]


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """A Gaussian process on the logarithm of a cost; its points are those of the family.

    ``parameters`` are named by :mod:`energy.thor.process`; ``spread`` widens its standard deviations so that intervals
    cover what they promise, found by leaving points out.
    """

    parameters: dict[str, list[_Number]]
    spread: Annotated[float, msgspec.Meta(gt=0, le=MAX_SPREAD)] = 1.0


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """All points of one kind of layer, and a fitted model per quantity."""

    kind: Name
    points: Annotated[list[Point], msgspec.Meta(max_length=5000)]
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
    threads: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    software: dict[str, str] = {}


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model that was metered beside the layers: ``measured`` per step, and what was predicted for it.

    ``low`` and ``high`` bound the 90 % interval. An ``anchor`` set the profile's factor, so it proves nothing.
    """

    model: Name
    quantity: Quantity
    batch: Count
    measured: Amount
    predicted: _Bound
    low: _Bound
    high: _Bound
    anchor: bool = False


class MeteredLayer(msgspec.Struct, frozen=True, array_like=True):
    """A layer of a metered model, as in :class:`energy.thor.layers.LayerSpec`."""

    name: str
    kind: Name
    sizes: dict[str, Count]
    calls: Count = 1


class Metered(msgspec.Struct, frozen=True, kw_only=True):
    """An anchor: what one step of a whole model cost, and its layers, so that a fit can set the factor."""

    model: Name
    batch: Count
    layers: list[MeteredLayer]
    costs: dict[Quantity, Amount]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """Mean power over one stretch of the profiling, for pictures."""

    at_s: _Number
    watts: _Watts


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """One window of the profiling, for pictures."""

    name: str
    start_s: _Number
    end_s: _Number


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was learned about one device. ``quantity`` is the one to report: the best that could be had.

    ``fixed`` is the cost of a step that no layer explains (a run of an empty graph). ``factor`` corrects whole models
    by an anchor, and ``factor_error`` is its relative standard error, shared by all predictions.

    ``power`` and ``idle_watts`` are modelled if :func:`power_modelled` says so; the file then has them under the names
    ``modelled_power`` and ``idle_modelled_watts``.
    """

    device: Device
    quantity: Quantity
    families: list[Family]
    fixed: dict[Quantity, Amount]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created_unix_s: Seconds = 0.0
    profiling_seconds: Seconds = 0.0
    sensed: Sensed | None = None
    factor: dict[Quantity, Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]] = {}
    factor_error: dict[Quantity, Annotated[float, msgspec.Meta(ge=0, le=1e3)]] = {}
    idle_watts: _Watts | None = None
    metered: list[Metered] = []
    wholes: list[Whole] = []
    power: list[Sample] = []
    windows: list[Mark] = []
    notes: list[str] = []


class _File(Profile, frozen=True, kw_only=True):
    """A profile as its file has it."""

    idle_modelled_watts: _Watts | None = None
    modelled_power: list[Sample] = []


class _Header(msgspec.Struct):
    format: str = ""
    format_version: int = 0


def power_modelled(profile: Profile) -> bool:
    """Whether power over time and idle power were modelled, not measured."""
    sensed = profile.sensed
    if profile.quantity == "modelled_joules":
        return True
    return sensed is not None and "modelled" in (sensed.quality, sensed.scope)


def load_profile(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        ProfileError: unreadable, no profile, a newer version, or a field of the wrong type or beyond its bounds.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); name a file that edge-energy wrote") from error
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"{path}: is larger than any profile; name a file that edge-energy wrote")
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"{path}: is no energy profile ({error}); make one with edge-energy profile") from error
    if header.format != FORMAT:
        raise ProfileError(f"{path}: has format {header.format!r}, not {FORMAT!r}; make one with edge-energy profile")
    if header.format_version > FORMAT_VERSION:
        raise ProfileError(
            f"{path}: profile format {header.format_version} is newer than this software reads ({FORMAT_VERSION}); "
            "update edge-training-runtime on this machine"
        )
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"{path}: is damaged: {error}; profile the device again") from error


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as indented JSON; the file is whole or not there, and can be read again.

    Raises:
        ProfileError: a number in it is not finite or beyond its bounds (a file that is there stays as it is), or it
            cannot be written.
    """
    data = _encode(profile, path)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _encode(profile: Profile, path: Path) -> bytes:
    fields: dict[str, Any] = msgspec.to_builtins(profile)
    if power_modelled(profile):
        fields["modelled_power"] = fields.pop("power")
        fields["idle_modelled_watts"] = fields.pop("idle_watts")
    cure = "nothing was written; measure again, and report it if that does not help"
    wrong = _not_finite(fields, "$")
    if wrong is not None:
        raise ProfileError(f"{path}: {wrong} is not finite; {cure}")
    data = msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"
    try:
        _decode(data)
    except msgspec.MsgspecError as error:
        raise ProfileError(f"{path}: could not be read again ({error}); {cure}") from error
    return data


def _decode(data: bytes) -> Profile:
    found = msgspec.json.decode(data, type=_File)
    values = {name: getattr(found, name) for name in Profile.__struct_fields__}
    # Earlier versions had modelled figures under the names of measured ones.
    values["power"] = found.power or found.modelled_power
    values["idle_watts"] = found.idle_modelled_watts if found.idle_watts is None else found.idle_watts
    return Profile(**values)


def _not_finite(value: Any, place: str) -> str | None:
    """Where the first number is that JSON cannot hold; None: nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (_not_finite(item, f"{place}.{name}") for name, item in rows)
    return next((wrong for wrong in found if wrong is not None), None)
