"""What can happen to a device's jobs and updates, and what is to be done about it: the words of :mod:`.jobs`."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from edge_runtime.agent.limits import RETRY_S, Decline
from edge_runtime.agent.pipe import Phase
from edge_runtime.messages import BlobRef, EnergyUse, Job, JobStatus, UpdateId, UpdateMeta
from edge_runtime.store.spool import RunChange, SpooledUpdate, State


# Events
class JobArrived(msgspec.Struct, frozen=True):
    """A job came. From disk come ``known``, the state of this job's update in the spool, ``crashes`` of its bundle, and
    ``held``: the version of the model that the job builds on is here. ``decline``: the device cannot afford it now.
    """

    now: float
    job: Job
    known: State | None
    crashes: int
    held: bool = True
    decline: Decline | None = None


class JobCancelled(msgspec.Struct, frozen=True):
    """The coordinator no longer wants a job."""

    run: str
    assignment: str


class BlobReady(msgspec.Struct, frozen=True):
    """A bundle or model is whole and verified on disk."""

    now: float
    sha256: str


class BlobFailed(msgspec.Struct, frozen=True):
    """A bundle or model cannot be had."""

    now: float
    sha256: str
    reason: str


class Trained(msgspec.Struct, frozen=True):
    """The worker finished the running job; its files are durable in the spool folder.

    ``key`` is for the case that the update is refused; ``change`` is what it does to the run; None: only evaluated.
    """

    now: float
    file: str
    blob: BlobRef
    meta: UpdateMeta
    key: str = ""
    change: RunChange | None = None


class PhaseBegun(msgspec.Struct, frozen=True):
    """The worker begins to train the running job, or to encode and write what it trained."""

    phase: Phase


class LimitReached(msgspec.Struct, frozen=True):
    """The running job, or the device on this day, has drawn the joules it may."""

    reason: str


class TrainingFailed(msgspec.Struct, frozen=True):
    """The worker reported that the running job cannot be done; ``energy``: what it drew until then."""

    now: float
    reason: str
    energy: EnergyUse | None = None


class ModelLost(msgspec.Struct, frozen=True):
    """The version that the running job builds on is not here any more: pruned while the job waited, or damaged."""

    now: float
    energy: EnergyUse | None = None


class WorkerCrashed(msgspec.Struct, frozen=True):
    """The worker died during the running job; ``ours``: the agent killed it (heat, limit), no fault of the bundle."""

    now: float
    reason: str
    ours: bool
    energy: EnergyUse | None = None


class DoneArrived(msgspec.Struct, frozen=True):
    """The coordinator has an update on disk."""

    update: UpdateId


class VerdictArrived(msgspec.Struct, frozen=True):
    """The coordinator's final word about an update."""

    now: float
    update: UpdateId
    counted: bool
    reason: str


class Connected(msgspec.Struct, frozen=True):
    """The link stands, or the coordinator is a new process: say again what it may not have heard."""


class Paused(msgspec.Struct, frozen=True):
    """Training may not run (reason), or may again (empty). ``keeps_work``: there is time to send what was trained.

    ``for_s``: for about how long it may not.
    """

    now: float
    reason: str
    keeps_work: bool = False
    for_s: float = RETRY_S


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""

    now: float


Event: TypeAlias = (
    JobArrived
    | JobCancelled
    | BlobReady
    | BlobFailed
    | Trained
    | PhaseBegun
    | LimitReached
    | TrainingFailed
    | ModelLost
    | WorkerCrashed
    | DoneArrived
    | VerdictArrived
    | Connected
    | Paused
    | Tick
)


# Effects
class FetchBlob(msgspec.Struct, frozen=True):
    """Have this blob on disk; answer with BlobReady or BlobFailed, at once if it is there already.

    ``inline``: its bytes, as the job brought them; empty: they are to be asked for.
    """

    blob: BlobRef
    inline: bytes = b""


class StopFetch(msgspec.Struct, frozen=True):
    """No job waits for this blob any more."""

    sha256: str


class StartTraining(msgspec.Struct, frozen=True):
    """Let the worker do this job; answer with ModelLost if the version that it builds on is gone since it arrived."""

    job: Job


class StopEarly(msgspec.Struct, frozen=True):
    """Let the worker end its training after this step; Trained follows, or WorkerCrashed (ours) if it goes on."""

    reason: str


class StopTraining(msgspec.Struct, frozen=True):
    """Kill the worker; WorkerCrashed (ours) follows."""

    reason: str


class SpoolUpdate(msgspec.Struct, frozen=True):
    """Make a finished update and what it changes of its run durable in one, before any later effect."""

    update: SpooledUpdate
    change: RunChange | None


class Offer(msgspec.Struct, frozen=True):
    """Offer an update; ``push``: with its bytes at once, else the coordinator asks for what it lacks."""

    update: UpdateId
    push: bool


class CloseUpdate(msgspec.Struct, frozen=True):
    """Note durably what the coordinator said; with a verdict, stop offering."""

    update: UpdateId
    state: State
    reason: str


class Report(msgspec.Struct, frozen=True):
    """Tell the coordinator that a job ended without an update."""

    status: JobStatus


class CountCrash(msgspec.Struct, frozen=True):
    """Note durably that the worker crashed with this bundle."""

    bundle: str


class ForgiveCrashes(msgspec.Struct, frozen=True):
    """A job with this bundle ended well."""

    bundle: str


Effect: TypeAlias = (
    FetchBlob
    | StopFetch
    | StartTraining
    | StopEarly
    | StopTraining
    | SpoolUpdate
    | Offer
    | CloseUpdate
    | Report
    | CountCrash
    | ForgiveCrashes
)
