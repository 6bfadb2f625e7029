"""The vocabulary of the round machine: rows it keeps, events that drive it, effects it asks for.

:mod:`coordinator.rounds` is pure: ``step(state, event)`` gives effects, a shell (MQTT and SQLite, or the simulator)
carries them out. The effects of one step are carried out in order; :class:`Save` comes first and commits in one
transaction, so nothing is said that is not stored. All other effects follow from the rows and are idempotent:
``resume(state)`` gives them again after a restart.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from coordinator.ledger import LedgerRow
from edge_runtime.messages import (
    BlobRef,
    DeviceState,
    EnergyUse,
    Evaluation,
    Heartbeat,
    Role,
    UpdateId,
    UpdateMeta,
)

RunStatus: TypeAlias = Literal["running", "finished", "failed", "stopped"]
AssignmentStatus: TypeAlias = Literal["open", "received", "failed", "declined", "cancelled"]


# Rows: what the store keeps, one table each.
class RunRow(msgspec.Struct, kw_only=True):
    """One run. ``version`` counts model versions: 0 is the initial model, round r makes version r + 1.

    ``phase`` "done" with ``status`` "running" waits for the last evaluation. ``down`` is the whole model for devices
    where that is not ``model`` itself; with a lossy downlink it is the snapshot of the shared model (none of version 0,
    which every device can make), and ``vector_sha256`` the hash of that model's numbers. ``method_state`` is the server
    method's own state. ``opened_unix_s`` is when the current round began, ``short_since_unix_s`` since when too few
    devices were there. ``elements`` are the model's numbers; ``bytes_up`` and ``bytes_down`` are packets after the last
    closed round. ``bytes_complete`` is false if the run was taken up again since then: what was counted before is lost.
    ``selector_memory`` is what the selector remembers beside the histories of devices. ``hyper`` are hyper-parameters
    that the server optimiser sets for the jobs of this version, over those of the plan. ``places`` are the devices that
    the round wants at work (0: none asked yet), fewer than usual where the selector chose fewer; then it is not asked
    again before ``select_after_unix_s``. ``wanted`` are the updates that the selector wants to close the round (0: it
    did not say). ``next_selection`` numbers the selections of the run.
    """

    run: str
    status: RunStatus = "running"
    reason: str = ""
    round: int = 0
    phase: Literal["selecting", "open", "aggregating", "done"] = "selecting"
    attempt: int = 0
    deadline_unix_s: float = 0.0
    version: int = 0
    model: BlobRef
    bundle: BlobRef
    initial_model: BlobRef
    initial_method_state: BlobRef | None = None
    down: BlobRef | None = None
    vector_sha256: str | None = None
    method_state: BlobRef | None = None
    test_set: BlobRef | None = None
    initial_test: Evaluation | None = None
    next_assignment: int = 0
    elements: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_complete: bool = True
    submitted_unix_s: float = 0.0
    opened_unix_s: float = 0.0
    ended_unix_s: float | None = None
    short_since_unix_s: float | None = None
    selector_memory: dict[str, float] = {}
    hyper: dict[str, float] = {}
    places: int = 0
    wanted: int = 0
    select_after_unix_s: float = 0.0
    next_selection: int = 0


class AssignmentRow(msgspec.Struct, kw_only=True):
    """What one device was asked to do. ``assignment`` is unique in its run.

    ``model`` is the whole model of ``version``. With a lossy downlink ``vector_sha256`` is set, and the device starts
    from its ``base_version`` and applies the changes that follow, or takes the whole model if that is None.
    ``away``: the device went offline while it was open, or its deadline passed in a run without rounds, so another one
    may be asked in its place; its update still counts. A ``standing`` assignment stays open until the run ends:
    ``sequence`` is the number of the update that its device pulled last (-1: none yet), ``version``, ``model``,
    ``steps`` and the times are those of that pull, and ``pulled`` says whether its update is still to come.
    ``selection`` is the number of the selection that chose it (-1: of an older version, which numbered none).
    """

    run: str
    assignment: str
    device: str
    round: int
    attempt: int = 0
    version: int
    model: BlobRef
    vector_sha256: str | None = None
    base_version: int | None = None
    epochs: int | None = None
    steps: int | None = None
    variant: str | None = None
    cut: str | None = None
    codec: str = "raw"
    byte_budget: int | None = None
    deadline_unix_s: float
    assigned_unix_s: float
    status: AssignmentStatus = "open"
    reason: str = ""
    away: bool = False
    role: Role = "trainer"
    standing: bool = False
    sequence: int = 0
    pulled: bool = False
    selection: int = -1


class UpdateRow(msgspec.Struct, kw_only=True):
    """One update and what became of it. ``verdict`` is final once it is not "pending".

    ``counted_round`` is the round whose aggregate takes the update with ``weight``; both are fixed when the update is
    taken in (while pending), and None for a refused one.
    """

    update: UpdateId
    blob: BlobRef
    meta: UpdateMeta
    received_unix_s: float
    verdict: Literal["pending", "counted", "refused"] = "pending"
    reason: str = ""
    counted_round: int | None = None
    weight: float | None = None


class HistoryRow(msgspec.Struct, kw_only=True):
    """What a run knows of a device from its earlier jobs; selectors read it, only the round machine writes it.

    ``asked`` and ``counted`` are jobs given and updates taken in; ``failures`` of them in a row (jobs that brought no
    update that counts, said or unsaid), without those that the device declined. ``last_round``: when it was asked last
    (-1: never). ``loss_rms`` and ``samples`` are of its last update. ``elapsed_s`` (from job to update) and ``step_s``,
    ``step_j`` (of training, as its updates said) are moving averages, None before the first. ``queue_j`` is the virtual
    energy queue. It declined (``declined``), or failed, and is not asked before ``not_before_unix_s``; after failures
    earlier, where too few others are left. ``cut_off`` weighs jobs in a row that were cancelled before their deadline,
    those without a word of the device most (:func:`coordinator.histories.note_cut_off`).
    """

    run: str
    device: str
    asked: int = 0
    counted: int = 0
    failures: int = 0
    last_round: int = -1
    loss_rms: float | None = None
    samples: int | None = None
    elapsed_s: float | None = None
    step_s: float | None = None
    step_j: float | None = None
    queue_j: float = 0.0
    not_before_unix_s: float = 0.0
    declined: bool = False
    cut_off: int = 0


class SelectionRow(msgspec.Struct, kw_only=True):
    """Why each device was chosen or not, at one selection of a round; ``number`` counts those of the run.

    ``report`` is compressed; see :mod:`coordinator.scheduling.explaining`.
    """

    run: str
    number: int
    round: int
    attempt: int
    at_unix_s: float
    report: bytes


class TableRow(msgspec.Struct, kw_only=True):
    """A device's row in the table of a server method that keeps one vector per device (AFA-CS, FedAMD)."""

    run: str
    device: str
    blob: BlobRef
    round: int


class HoldingRow(msgspec.Struct, kw_only=True):
    """The version of the shared model that a device holds, as far as is known; None: none. For a lossy downlink."""

    run: str
    device: str
    version: int | None = None


class RoundRow(msgspec.Struct, kw_only=True):
    """One closed round: the model it made, what it took, and what was measured on that model.

    ``down`` and ``vector_sha256`` are as in :class:`RunRow`; ``change`` leads from the shared model of the version
    before to that of this one. ``bytes_up`` and ``bytes_down`` are MQTT packets of this run since the round before,
    ``bytes_bundle`` that part of ``bytes_down`` that was the bundle; ``bytes_complete`` is false where the coordinator
    was restarted in between, and they are only those that it counted after that. ``encode_cpu_ms`` and
    ``written_bytes`` are sums over the updates, of what the devices reported.
    """

    run: str
    round: int
    version: int
    model: BlobRef
    opened_unix_s: float
    closed_unix_s: float
    updates: int
    late_updates: int
    samples: int
    down: BlobRef | None = None
    change: BlobRef | None = None
    vector_sha256: str | None = None
    method_state: BlobRef | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_bundle: int = 0
    bytes_complete: bool = True
    encode_cpu_ms: int = 0
    written_bytes: int = 0
    train_loss: float | None = None
    test: Evaluation | None = None
    devices: Evaluation | None = None  # hold-outs of the devices, measured on the version this round started from


class DeviceRow(msgspec.Struct, kw_only=True):
    """What the server last knew about one device, for other processes to look at."""

    device: str
    online: bool
    last_contact_unix_s: float
    conflict: str = ""
    state: DeviceState
    heartbeat: Heartbeat | None = None


Row: TypeAlias = (
    RunRow
    | AssignmentRow
    | UpdateRow
    | LedgerRow
    | HoldingRow
    | HistoryRow
    | SelectionRow
    | TableRow
    | RoundRow
    | DeviceRow
)


# Events
class Tick(msgspec.Struct, frozen=True):
    """Time has passed. Drives selection and deadlines."""

    now: float


class DeviceJoined(msgspec.Struct, frozen=True):
    """A device announced itself (again): what it was told may be lost, tell it again."""

    now: float
    device: str


class DeviceLeft(msgspec.Struct, frozen=True):
    """A device went offline (it said so, or its last will did): somebody else may be asked in its place."""

    now: float
    device: str


class UpdateOffered(msgspec.Struct, frozen=True):
    """A device offers an update; answered with a fetch, or at once with done or a verdict."""

    now: float
    update: UpdateId
    blob: BlobRef
    meta: UpdateMeta


class UpdateArrived(msgspec.Struct, frozen=True):
    """All bytes of an offered update are durable and their hash and content are right."""

    now: float
    update: UpdateId
    blob: BlobRef
    meta: UpdateMeta


class UpdateDamaged(msgspec.Struct, frozen=True):
    """An update arrived whole but cannot be used (NaN, wrong size, undecodable): refuse it with this reason."""

    now: float
    update: UpdateId
    blob: BlobRef
    meta: UpdateMeta
    reason: str


class JobReported(msgspec.Struct, frozen=True):
    """A device says that an assignment failed, or that it was ``rejected`` and never begun.

    ``declined_s``: rejected because of its owner's limits, which will hold for about so long.
    """

    now: float
    device: str
    assignment: str
    reason: str
    rejected: bool = False
    energy: EnergyUse | None = None
    declined_s: float | None = None


class Pulled(msgspec.Struct, frozen=True):
    """A device wants to train its standing assignment now, for ``steps`` steps, as its update ``sequence``."""

    now: float
    device: str
    assignment: str
    sequence: int
    steps: int


class Aggregated(msgspec.Struct, frozen=True):
    """The new model of a round is durable.

    ``down``, ``change`` and ``vector_sha256`` are as in :class:`RoundRow`; the bytes are those of this run's packets
    since the round before. ``hyper`` is as in :class:`RunRow`; ``table`` are the rows that changed, by device.
    """

    now: float
    round: int
    model: BlobRef
    down: BlobRef | None = None
    change: BlobRef | None = None
    vector_sha256: str | None = None
    method_state: BlobRef | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_bundle: int = 0
    hyper: dict[str, float] = {}
    table: dict[str, BlobRef] = {}


class Evaluated(msgspec.Struct, frozen=True):
    """A model version was evaluated on the coordinator's test set."""

    now: float
    version: int
    evaluation: Evaluation


class StopRequested(msgspec.Struct, frozen=True):
    """A user wants the run to end now; what it has stays."""

    now: float
    reason: str = "stopped by the user"


class WorkFailed(msgspec.Struct, frozen=True):
    """Aggregation or evaluation cannot be done (unusable graph, full disk): the run fails with this reason."""

    now: float
    reason: str


Event: TypeAlias = (
    Tick
    | DeviceJoined
    | DeviceLeft
    | UpdateOffered
    | UpdateArrived
    | UpdateDamaged
    | JobReported
    | Pulled
    | Aggregated
    | Evaluated
    | StopRequested
    | WorkFailed
)


# Effects
class Save(msgspec.Struct, frozen=True):
    """Store these rows (insert or replace) in one transaction, before any later effect."""

    rows: list[Row]


class SendJob(msgspec.Struct, frozen=True):
    """Tell a device its assignment."""

    assignment: AssignmentRow


class SendStanding(msgspec.Struct, frozen=True):
    """Tell a device of its standing assignment."""

    assignment: AssignmentRow


class SendCancel(msgspec.Struct, frozen=True):
    """Tell a device that an assignment is no longer wanted."""

    device: str
    assignment: str
    reason: str


class Fetch(msgspec.Struct, frozen=True):
    """Receive the bytes of an offered update."""

    update: UpdateId
    blob: BlobRef
    meta: UpdateMeta


class SendDone(msgspec.Struct, frozen=True):
    """Tell a device that its update is durable here."""

    update: UpdateId


class SendVerdict(msgspec.Struct, frozen=True):
    """Tell a device the final word about its update; ``ends``: nothing more can come of its assignment."""

    update: UpdateId
    counted: bool
    reason: str = ""
    ends: bool = False


class AnswerFromStore(msgspec.Struct, frozen=True):
    """An update the machine no longer remembers: send the stored verdict, or refuse as unknown.

    ``ends``: nothing more can come of its assignment.
    """

    update: UpdateId
    ends: bool = False


class Aggregate(msgspec.Struct, frozen=True):
    """Make the next model from these updates, in this order, with these weights; answer with Aggregated.

    ``base`` is the server's model of ``version``. ``held`` are the whole models that devices got (``down`` of
    :class:`RunRow`, or the model itself): of this version, and of those that the updates are relative to. For methods
    with a table: ``table`` are the rows of the devices in ``updates``, and ``members`` is the number of devices that
    have one or may get one.
    """

    run: str
    round: int
    version: int
    base: BlobRef
    updates: list[UpdateRow]
    held: dict[int, BlobRef]
    method_state: BlobRef | None = None
    roles: dict[str, Role] = {}  # by assignment, those that are no trainers
    table: dict[str, BlobRef] = {}
    members: int = 0


class Evaluate(msgspec.Struct, frozen=True):
    """Evaluate a model version on the test set; answer with Evaluated."""

    version: int
    model: BlobRef


class Finished(msgspec.Struct, frozen=True):
    """The run has ended; nothing more will be asked."""

    status: RunStatus
    reason: str


Effect: TypeAlias = (
    Save
    | SendJob
    | SendStanding
    | SendCancel
    | Fetch
    | SendDone
    | SendVerdict
    | AnswerFromStore
    | Aggregate
    | Evaluate
    | Finished
)
