"""Every message between agent and coordinator: typed structs in MessagePack, one schema version.

Unknown fields are ignored (a newer peer may send more), a field of the wrong type is refused by name. A message
travels as a map with the field ``t`` naming its type and ``v`` the schema version of the sender. Wire deadlines are
durations in seconds, since device clocks may be years off.

What goes with every update and every job has one-letter names on the wire (``rename``) and leaves out what has its
default: around an update of some hundred bytes, the envelope counts.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from edge_runtime.errors import MessageError

SCHEMA_VERSION = 1
OLDEST_SCHEMA_VERSION = 1
MESSAGE_LIMIT_BYTES = 120_000  # under 128 KiB, the smallest packet limit of a cloud broker in use

Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Role: TypeAlias = Literal["trainer", "anchor"]


def _version_field() -> int:
    """The sender's schema version; by a factory, so that it is never left out as a default."""
    field: int = msgspec.field(default_factory=lambda: SCHEMA_VERSION)
    return field


def _versions_field() -> tuple[int, int]:
    field: tuple[int, int] = msgspec.field(default_factory=lambda: (OLDEST_SCHEMA_VERSION, SCHEMA_VERSION))
    return field


class UpdateId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Identity of one client update. The round is an attribute of the assignment, not part of the identity."""

    run: Name
    device: Name
    assignment: Name
    sequence: Count

    def __str__(self) -> str:
        return f"{self.run}/{self.device}/{self.assignment}/{self.sequence}"


class BlobRef(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"sha256": "s", "size_bytes": "n", "chunk_bytes": "c"},
):
    """A blob that can be transferred: its size and content hash, and how it is cut into chunks."""

    sha256: Sha256
    size_bytes: Count
    chunk_bytes: Annotated[int, msgspec.Meta(ge=64, le=MESSAGE_LIMIT_BYTES)] = 96 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device refuses to exceed."""

    blob_bytes: Count
    worker_memory_bytes: Count


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset a device offers for training; ``samples`` is what it last counted, None before the first look."""

    name: Name
    samples: Count | None = None


class EnergySource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a device reports joules from; see :class:`energy.sensors.base.Source` for the words."""

    sensor: str
    scope: str
    quality: str
    covers: str = ""


class EnergyUse(msgspec.Struct, frozen=True, array_like=True):
    """What one job drew, gross, in millijoules. None: could not be known (never a silent zero).

    ``train_mj``, ``compress_mj`` and ``other_mj`` (reading, loading, evaluating) were measured, unless ``modelled``, by
    the sensor of this name; the device announced the rest about it. ``doubtful``: something speaks against them
    (throttling, gaps, a sensor that changed). ``radio_mj`` is always modelled, from bytes and constants of the link.
    ``idle_mw`` is the idle power before the job.
    """

    train_mj: Count | None = None
    compress_mj: Count | None = None
    other_mj: Count | None = None
    radio_mj: Count | None = None
    idle_mw: Count | None = None
    sensor: str = ""
    modelled: bool = False
    doubtful: bool = False


class Telemetry(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="telemetry"):
    """What the device measures about itself. None: this device cannot measure it (never a silent zero).

    On the wire it is what agents sent before there was a :class:`Heartbeat`; they are understood still.
    """

    v: int = _version_field()
    uptime_s: float
    clock_unix_s: float
    clock_synchronised: bool | None = None
    cpu_percent: float | None = None
    free_memory_bytes: Count | None = None
    temperature_c: float | None = None
    battery_percent: float | None = None
    on_external_power: bool | None = None
    link_sent_bytes: Count | None = None
    link_received_bytes: Count | None = None


Declines: TypeAlias = Literal["", "charging", "metered", "hours", "battery", "heat", "memory", "joules", "data"]
DECLINES: tuple[Declines, ...] = ("", "charging", "metered", "hours", "battery", "heat", "memory", "joules", "data")
HEARTBEAT_LIMIT_BYTES = 64
_Byte: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_Short: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Long: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_Percent: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=100)]
_Celsius: TypeAlias = Annotated[int, msgspec.Meta(ge=-128, le=255)]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True):
    """What a device says of itself every so often, retained, in at most 64 bytes; None: it cannot know.

    ``clock_unix_s`` is the device's own clock. ``declines`` indexes :data:`DECLINES`: the owner's limit for which it
    would decline any job now, 0 for none. ``free_memory_mb`` and ``data_left_mb`` (of this month's cap) are in 10^6
    bytes, the largest value standing for that or more. ``temperature_margin_c`` is what is left below the device's
    thermal cap. ``reserve_percent`` is what the owner wants left in the battery. ``up_kbit_s`` and ``down_kbit_s`` are
    of the link as measured. ``step_us`` and ``step_uj`` are time and energy of one training step of the bundle whose
    SHA-256 begins with ``bundle`` (4 bytes; empty: none was trained yet). ``availability_percent`` is how likely the
    device thinks it can take part during the next hour, from its own history. ``joules_left`` are of this day. Both
    budgets are rounded up: the device itself knows them exactly.
    """

    v: _Byte = 1
    uptime_s: _Long = 0
    clock_unix_s: _Long = 0
    clock_synchronised: bool | None = None
    on_external_power: bool | None = None
    link_metered: bool | None = None
    declines: _Byte = 0
    cpu_percent: _Percent | None = None
    free_memory_mb: _Short | None = None
    temperature_c: _Celsius | None = None
    temperature_margin_c: _Celsius | None = None
    battery_percent: _Percent | None = None
    reserve_percent: _Percent | None = None
    up_kbit_s: _Long | None = None
    down_kbit_s: _Long | None = None
    bundle: Annotated[bytes, msgspec.Meta(max_length=4)] = b""
    step_us: _Long | None = None
    step_uj: _Long | None = None
    availability_percent: _Percent | None = None
    data_left_mb: _Short | None = None
    joules_left: _Long | None = None


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="state"):
    """Retained presence and announcement of a device; the last will is the same message with ``online`` false.

    The coordinator assigns only what was announced here. ``session`` differs for every connection, so a repeated
    retained copy is told from a reconnect; ``instance`` differs for every agent installation, so two agents with one
    identity are told apart. ``abilities`` are what came after the first release: "standing" (standing assignments) and
    "anchor" (that role). ``battery_wh`` is the capacity of its battery when full.
    """

    v: int = _version_field()
    device: Name
    online: bool
    session: str
    instance: str
    software: str = ""
    platform: str = ""
    schema_versions: tuple[int, int] = _versions_field()
    codecs: list[str] = []
    methods: list[str] = []
    backends: list[str] = []
    datasets: list[DatasetInfo] = []
    limits: Limits | None = None
    energy: EnergySource | None = None
    abilities: list[str] = []
    battery_wh: Annotated[float, msgspec.Meta(gt=0.0)] | None = None


class CoordinatorState(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="coordinator"):
    """Retained presence of the coordinator. A new ``session`` tells devices to announce themselves again."""

    v: int = _version_field()
    online: bool
    session: str
    software: str = ""


class ModelRef(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"base": "u", "blobs": "b", "vector_sha256": "h"},
):
    """The model that a job starts from.

    Without ``base`` the one blob holds the whole model. With ``base`` the blobs are the changes that lead from that
    version to the job's version, oldest first; version 0 are the bundle's own parameters, on the run's grid
    (:mod:`edge_runtime.compression.grid`), which every device can make. ``vector_sha256`` is the SHA-256 of the
    little-endian float32 vector that must come out; None: the blob's own hash says it all.
    """

    base: Count | None = None
    blobs: list[BlobRef] = []
    vector_sha256: Sha256 | None = None


class Job(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="t",
    tag="job",
    rename={
        "run": "r",
        "assignment": "a",
        "round": "n",
        "model_version": "w",
        "bundle": "b",
        "model": "m",
        "inline": "i",
        "dataset": "d",
        "deadline_s": "x",
        "epochs": "e",
        "steps": "s",
        "batch_size": "z",
        "last_batch": "lb",
        "hyper": "h",
        "method": "f",
        "options": "o",
        "codec": "c",
        "codec_options": "co",
        "byte_budget": "cb",
        "joule_limit": "jl",
        "evaluate": "ev",
        "holdout_fraction": "hf",
        "priority": "p",
        "seed": "q",
        "role": "ro",
        "sequence": "sq",
    },
):
    """Work for one device: train (and evaluate) one model on local data and send the update.

    Exactly one of ``epochs`` and ``steps`` is set, or neither: evaluate only. ``deadline_s`` counts from arrival.
    ``hyper`` overrides defaults of the bundle's optimiser. ``options`` are hyper-parameters of the client method.
    ``inline`` holds the bytes of the model's last blob where they are few. ``byte_budget`` is for the whole update;
    None leaves it to the codec. Training ends early, and what it reached is sent, when it has drawn ``joule_limit``.
    ``role``: a trainer takes local steps; an anchor makes one pass without any and sends the gradient at the model it
    got. ``sequence`` is that of the update: 0 but for jobs of a standing assignment.
    """

    v: int = _version_field()
    run: Name
    assignment: Name
    round: Count
    model_version: Count
    bundle: BlobRef
    model: ModelRef
    inline: bytes = b""
    dataset: Name
    deadline_s: float
    epochs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 32
    last_batch: Literal["keep", "drop"] = "keep"
    hyper: dict[str, float] = {}
    method: str = "fedavg"
    options: dict[str, float] = {}
    variant: str | None = None
    cut: str | None = None
    codec: str = "raw"
    codec_options: dict[str, bool | int | float | str] = {}
    byte_budget: Count | None = None
    joule_limit: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    evaluate: bool = True
    holdout_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    max_samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_age_s: float | None = None
    priority: int = 0
    seed: Count = 0
    role: Role = "trainer"
    sequence: Count = 0


class Standing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="standing"):
    """A standing assignment: the device trains when it chooses, for as many steps as it chooses, again and again.

    Whenever it wants to, it sends a :class:`Pull` and gets a :class:`Job` with the model of that moment. It chooses
    ``min_steps`` to ``max_steps`` steps, and lets ``interval_s`` pass between two pulls. ``sequence`` is the first
    number that its next update may have. Ends with a :class:`Cancel`; repeated whenever the device announces itself.
    """

    v: int = _version_field()
    run: Name
    assignment: Name
    sequence: Count = 0
    dataset: Name
    bundle: BlobRef
    min_steps: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_steps: Annotated[int, msgspec.Meta(ge=1)]
    interval_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class Pull(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="pull"):
    """A device wants to train its standing assignment now, for ``steps`` steps, as its update ``sequence``."""

    v: int = _version_field()
    run: Name
    assignment: Name
    sequence: Count
    steps: Annotated[int, msgspec.Meta(ge=1)]


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="cancel"):
    """The coordinator no longer wants this assignment; a finished update is still sent and gets its verdict."""

    v: int = _version_field()
    run: Name
    assignment: Name
    reason: str = ""


class JobStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="status"):
    """The end of a job without an update. ``rejected``: will not start; ``failed``: started and ended.

    ``declined_s``: the job was rejected because of the limits that the device's owner set, and would be for about so
    many seconds.
    """

    v: int = _version_field()
    run: Name
    assignment: Name
    status: Literal["failed", "rejected"]
    reason: str = ""
    energy: EnergyUse | None = None
    declined_s: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


class Evaluation(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"samples": "n", "loss_sum": "l", "correct": "c"},
):
    """Sums over the samples of one evaluation, so that results combine exactly."""

    samples: Count
    loss_sum: float
    correct: Count | None = None


class UpdateMeta(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={
        "round": "r",
        "model_version": "w",
        "samples": "n",
        "steps": "s",
        "loss": "l",
        "train_ms": "t",
        "encode_cpu_ms": "c",
        "written_bytes": "f",
        "evaluation": "e",
        "energy": "j",
        "stopped": "x",
        "loss_rms": "q",
    },
):
    """What a device says about its update; ``evaluation`` is of the received model on the device's hold-out.

    ``train_ms`` is wall time; ``encode_cpu_ms`` is CPU time of the codec, so that it can be weighed against the time
    that its bytes would take on the link. ``written_bytes`` went to the device's storage for this job: model, state of
    the codec and update. ``stopped`` says why training ended before its last step (joules, heat), in words.
    ``loss_rms`` is the root of the mean squared loss of the batches seen.
    """

    round: Count
    model_version: Count
    samples: Count
    steps: Count
    loss: float | None = None
    train_ms: Count = 0
    encode_cpu_ms: Count = 0
    written_bytes: Count = 0
    evaluation: Evaluation | None = None
    energy: EnergyUse | None = None
    stopped: str = ""
    loss_rms: float | None = None


class UpdateOffer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="t",
    tag="offer",
    rename={"update": "u", "blob": "b", "meta": "m", "first": "d"},
):
    """A finished update waits on the device.

    ``first`` is chunk 0 (CRC and data), or empty when offered again. Without ``blob`` chunk 0 is all of it, and hash
    and size are those of its data.
    """

    v: int = _version_field()
    update: UpdateId
    blob: BlobRef | None = None
    meta: UpdateMeta
    first: bytes = b""


class Need(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="need"):
    """The receiver of a blob asks for chunks: ``ranges`` of (first, count). Sent by either side."""

    v: int = _version_field()
    sha256: Sha256
    ranges: list[tuple[Count, Count]]


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="gone"):
    """The sender no longer has a blob that the receiver asked for."""

    v: int = _version_field()
    sha256: Sha256


class Done(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="done"):
    """The update is durable at the coordinator; its bytes may be dropped on the device, its verdict follows."""

    v: int = _version_field()
    update: UpdateId


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="verdict"):
    """The one final word about an update: counted in a model version, or refused with a reason.

    ``ends``: its assignment is over, too; of a standing one nothing more is to be pulled.
    """

    v: int = _version_field()
    update: UpdateId
    counted: bool
    reason: str = ""
    ends: bool = False


FromDevice: TypeAlias = Telemetry | DeviceState | JobStatus | UpdateOffer | Need | Gone | Pull
FromCoordinator: TypeAlias = CoordinatorState | Job | Standing | Cancel | Need | Gone | Done | Verdict
Message: TypeAlias = FromDevice | FromCoordinator


class _Version(msgspec.Struct):
    v: int = 0


# Bad UTF-8 in a tag and absurd nesting leave msgspec as errors of their own.
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_version = msgspec.msgpack.Decoder(_Version)
_from_device: msgspec.msgpack.Decoder[FromDevice] = msgspec.msgpack.Decoder(FromDevice)
_from_coordinator: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
_heartbeat: msgspec.msgpack.Decoder[Heartbeat] = msgspec.msgpack.Decoder(Heartbeat)


def encode(message: Message) -> bytes:
    """MessagePack bytes of a message.

    Raises:
        MessageError: the message would not fit one packet.
    """
    data = _encoder.encode(message)
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise MessageError(
            f"{type(message).__name__} of {len(data)} bytes is over the packet limit of {MESSAGE_LIMIT_BYTES}; "
            "send bulk data as a blob"
        )
    return data


def encode_heartbeat(heartbeat: Heartbeat) -> bytes:
    """The bytes of a heartbeat, at most ``HEARTBEAT_LIMIT_BYTES`` whatever it says."""
    return _encoder.encode(heartbeat)


def decode_heartbeat(data: bytes) -> Heartbeat:
    """The heartbeat in these bytes; what a newer device says beyond what is known here is ignored.

    Raises:
        MessageError: oversize or malformed.
    """
    if len(data) > 4 * HEARTBEAT_LIMIT_BYTES:
        raise MessageError(f"heartbeat of {len(data)} bytes refused")
    try:
        return _heartbeat.decode(data)
    except _MALFORMED as error:
        raise MessageError(f"heartbeat refused: {error}") from error


def decode_from_device(data: bytes) -> FromDevice:
    """Decodes a message a device may send.

    Raises:
        MessageError: oversize, malformed, of a type a device may not send, or of a schema version not spoken here.
    """
    _check_version(data)
    try:
        return _from_device.decode(data)
    except _MALFORMED as error:
        raise MessageError(f"message refused: {error}") from error


def decode_from_coordinator(data: bytes) -> FromCoordinator:
    """Decodes a message the coordinator may send; raises like :func:`decode_from_device`."""
    _check_version(data)
    try:
        return _from_coordinator.decode(data)
    except _MALFORMED as error:
        raise MessageError(f"message refused: {error}") from error


def _check_version(data: bytes) -> None:
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise MessageError(f"message of {len(data)} bytes refused: the limit is {MESSAGE_LIMIT_BYTES}")
    try:
        version = _version.decode(data).v
    except _MALFORMED as error:
        raise MessageError(f"message refused: {error}") from error
    if (
        not OLDEST_SCHEMA_VERSION <= version <= SCHEMA_VERSION + 1
    ):  # one newer keeps working: unknown fields are ignored
        raise MessageError(
            f"message of schema version {version} refused: this side speaks {OLDEST_SCHEMA_VERSION} to "
            f"{SCHEMA_VERSION + 1}; update the older side"
        )
