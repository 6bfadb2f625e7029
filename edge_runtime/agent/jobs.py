"""What the agent does about jobs and updates, as a pure state machine: no I/O, clocks or threads.

``step(state, event)`` changes the state and gives effects; the daemon (or a simulated device) carries them out in
order. Jobs live in memory only: a coordinator that misses an update sends its job again. Updates are durable before
anything is said about them, so after a restart :func:`AgentState.restore` and ``Connected`` are all it takes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from edge_runtime.messages import BlobRef, Job, JobStatus, UpdateId, UpdateMeta
from edge_runtime.store.spool import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge_runtime.store.spool import SpooledUpdate

CRASH_LIMIT = 3
QUEUE_LIMIT = 64
PAUSE_PATIENCE_S = 60.0  # how long jobs wait for a pause to end before another device may have them

Key: TypeAlias = tuple[str, str]  # run, assignment


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this device announced; a job that needs anything else is rejected."""

    datasets: frozenset[str]
    codecs: frozenset[str]
    methods: frozenset[str]
    blob_limit_bytes: int


class Entry(msgspec.Struct):
    """A job and how far it is."""

    job: Job
    expires_at: float
    missing: set[str]
    running: bool = False


class AgentState(msgspec.Struct):
    """Everything the agent remembers between events."""

    device: str
    capabilities: Capabilities
    jobs: dict[Key, Entry] = {}
    updates: dict[UpdateId, State] = {}  # without a verdict
    crashes: dict[str, int] = {}  # by bundle, in a row
    running: Key | None = None
    paused: str = ""  # why no training may run now (heat, battery, memory); empty: it may
    paused_at: float = 0.0

    @classmethod
    def restore(cls, device: str, capabilities: Capabilities, updates: Iterable[SpooledUpdate]) -> AgentState:
        """The state after a restart, from the open updates of the spool."""
        return cls(device, capabilities, updates={update.update: update.state for update in updates})


# Events
class JobArrived(msgspec.Struct, frozen=True):
    """A job came. ``known``: state of this job's update in the spool; ``crashes``: of its bundle; both from disk."""

    now: float
    job: Job
    known: Literal["ready", "delivered", "counted", "refused"] | None
    crashes: int


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
    """The worker finished the running job; the file is durable in the spool folder."""

    now: float
    file: str
    blob: BlobRef
    meta: UpdateMeta


class TrainingFailed(msgspec.Struct, frozen=True):
    """The worker reported that the running job cannot be done."""

    now: float
    reason: str


class WorkerCrashed(msgspec.Struct, frozen=True):
    """The worker died during the running job; ``ours``: the agent killed it (heat, limit), no fault of the bundle."""

    now: float
    reason: str
    ours: bool


class DoneArrived(msgspec.Struct, frozen=True):
    """The coordinator has an update on disk."""

    update: UpdateId


class VerdictArrived(msgspec.Struct, frozen=True):
    """The coordinator's final word about an update."""

    update: UpdateId
    counted: bool
    reason: str


class Connected(msgspec.Struct, frozen=True):
    """The link stands, or the coordinator is a new process: say again what it may not have heard."""


class Paused(msgspec.Struct, frozen=True):
    """Training may not run (reason), or may again (empty)."""

    now: float
    reason: str


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""

    now: float


Event: TypeAlias = (
    JobArrived
    | JobCancelled
    | BlobReady
    | BlobFailed
    | Trained
    | TrainingFailed
    | WorkerCrashed
    | DoneArrived
    | VerdictArrived
    | Connected
    | Paused
    | Tick
)


# Effects
class FetchBlob(msgspec.Struct, frozen=True):
    """Have this blob on disk; answer with BlobReady or BlobFailed, at once if it is there already."""

    blob: BlobRef


class StopFetch(msgspec.Struct, frozen=True):
    """No job waits for this blob any more."""

    sha256: str


class StartTraining(msgspec.Struct, frozen=True):
    """Let the worker do this job."""

    job: Job


class StopTraining(msgspec.Struct, frozen=True):
    """Kill the worker; WorkerCrashed (ours) follows."""

    reason: str


class SpoolUpdate(msgspec.Struct, frozen=True):
    """Make a finished update durable, before any later effect."""

    update: UpdateId
    file: str
    blob: BlobRef
    meta: UpdateMeta


class Offer(msgspec.Struct, frozen=True):
    """Offer an update; ``push``: with its bytes at once, else the coordinator asks for what it lacks."""

    update: UpdateId
    push: bool


class CloseUpdate(msgspec.Struct, frozen=True):
    """Note durably what the coordinator said and free the bytes; stop offering."""

    update: UpdateId
    state: State
    reason: str


class Report(msgspec.Struct, frozen=True):
    """Tell the coordinator how a job is going."""

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
    | StopTraining
    | SpoolUpdate
    | Offer
    | CloseUpdate
    | Report
    | CountCrash
    | ForgiveCrashes
)


def step(state: AgentState, event: Event) -> list[Effect]:  # noqa: C901, PLR0911, PLR0912 - one arm per event
    """Changes ``state`` by one event and gives what to do, in order."""
    match event:
        case JobArrived():
            return _job_arrived(state, event)
        case JobCancelled():
            return _remove(state, (event.run, event.assignment), "cancelled by the coordinator", report=False)
        case BlobReady(now, sha256):
            for entry in state.jobs.values():
                entry.missing.discard(sha256)
            return _start_next(state, now)
        case BlobFailed(now, sha256, reason):
            effects: list[Effect] = []
            for key in [key for key, entry in state.jobs.items() if sha256 in entry.missing]:
                effects += _remove(state, key, reason)
            return effects + _start_next(state, now)
        case Trained():
            return _trained(state, event)
        case TrainingFailed(now, reason):
            return _finish_running(state, reason) + _start_next(state, now)
        case WorkerCrashed():
            return _crashed(state, event)
        case DoneArrived(update):
            if state.updates.get(update) != "ready":
                return []
            state.updates[update] = "delivered"
            return [CloseUpdate(update, "delivered", "")]
        case VerdictArrived(update, counted, reason):
            if state.updates.pop(update, None) is None:
                return []
            return [CloseUpdate(update, "counted" if counted else "refused", reason)]
        case Connected():
            return [Offer(update, push=False) for update in state.updates]
        case Paused(now, reason):
            return _paused(state, now, reason)
        case Tick(now):
            return _give_up_waiting(state, now) + _start_next(state, now)


def _job_arrived(state: AgentState, event: JobArrived) -> list[Effect]:
    job, key = event.job, (event.job.run, event.job.assignment)
    update = UpdateId(job.run, state.device, job.assignment, 0)
    if event.known in ("ready", "delivered") or update in state.updates:  # a full disk may keep it out of the spool
        return [Offer(update, push=False)]
    if event.known is not None:  # a coordinator that knows this verdict no longer waits for the job
        return [_report(job, "rejected", _closed(event.known))]
    entry = state.jobs.get(key)
    if entry is not None:  # at work on it; the coordinator may have extended its deadline or cut its blobs anew
        entry.expires_at = max(entry.expires_at, event.now + job.deadline_s)
        fetch = [FetchBlob(blob) for blob in (job.bundle, job.model) if blob.sha256 in entry.missing]
        return [_report(job, "accepted"), *fetch]
    reason = _unfit(state, job, event.crashes)
    if reason:
        return [_report(job, "rejected", reason)]
    state.crashes.pop(job.bundle.sha256, None)  # the disk knows better: a quarantine may have been lifted
    if event.crashes:
        state.crashes[job.bundle.sha256] = event.crashes
    missing = {job.bundle.sha256, job.model.sha256}
    state.jobs[key] = Entry(job, event.now + job.deadline_s, missing)
    return [_report(job, "accepted"), *(FetchBlob(blob) for blob in (job.bundle, job.model))]


def _closed(verdict: str) -> str:
    return (
        f"the update of this assignment was already {verdict}: the coordinator's state is older than this device's; "
        "submit the plan under another name"
    )


def _paused(state: AgentState, now: float, reason: str) -> list[Effect]:
    if reason and not state.paused:
        state.paused_at = now
    state.paused = reason
    if reason and state.running is not None:
        return [StopTraining(reason)]
    return _start_next(state, now)


def _give_up_waiting(state: AgentState, now: float) -> list[Effect]:
    """Jobs that a pause kept waiting too long fail, so that the coordinator can ask another device."""
    effects: list[Effect] = []
    if state.paused and now - state.paused_at >= PAUSE_PATIENCE_S:
        for key in [key for key, entry in state.jobs.items() if not entry.running]:
            effects += _remove(state, key, f"training is paused here: {state.paused}")
    return effects


def _unfit(state: AgentState, job: Job, crashes: int) -> str:  # noqa: PLR0911 - one reason each
    can = state.capabilities
    for kind, name, known in (
        ("dataset", job.dataset, can.datasets),
        ("codec", job.codec, can.codecs),
        ("method", job.method, can.methods),
    ):
        if name not in known:
            return f"{kind} {name!r} is not on this device (it has {', '.join(sorted(known)) or 'none'})"
    if state.paused:
        return f"training is paused here: {state.paused}"
    if not math.isfinite(job.deadline_s):
        return f"a deadline of {job.deadline_s} s is no duration"
    size = max(job.bundle.size_bytes, job.model.size_bytes)
    if size > can.blob_limit_bytes:
        return f"blob of {size} bytes is over this device's limit of {can.blob_limit_bytes}"
    if crashes >= CRASH_LIMIT:
        return _quarantine(job.bundle.sha256, crashes)
    if len(state.jobs) >= QUEUE_LIMIT:
        return f"the queue of this device is full ({QUEUE_LIMIT} jobs)"
    return ""


def _quarantine(bundle: str, crashes: int) -> str:
    return f"bundle {bundle[:12]} crashed the worker {crashes} times and is in quarantine here"


def _start_next(state: AgentState, now: float) -> list[Effect]:
    effects: list[Effect] = []
    for key in [key for key, entry in state.jobs.items() if entry.expires_at <= now and not entry.running]:
        effects += _remove(state, key, "the deadline passed before training could start")
    if state.running is not None or state.paused:
        return effects
    ready = [
        (-entry.job.priority, order, key) for order, (key, entry) in enumerate(state.jobs.items()) if not entry.missing
    ]
    if ready:
        key = min(ready)[2]
        entry = state.jobs[key]
        entry.running, state.running = True, key
        effects.append(StartTraining(entry.job))
    return effects


def _trained(state: AgentState, event: Trained) -> list[Effect]:
    if state.running is None:
        return []
    entry = state.jobs.pop(state.running)
    state.running = None
    update = UpdateId(entry.job.run, state.device, entry.job.assignment, 0)
    state.updates[update] = "ready"
    effects: list[Effect] = [SpoolUpdate(update, event.file, event.blob, event.meta), Offer(update, push=True)]
    if entry.job.bundle.sha256 in state.crashes:
        del state.crashes[entry.job.bundle.sha256]
        effects.append(ForgiveCrashes(entry.job.bundle.sha256))
    return effects + _start_next(state, event.now)


def _crashed(state: AgentState, event: WorkerCrashed) -> list[Effect]:
    if state.running is None:
        return _start_next(state, event.now)
    bundle = state.jobs[state.running].job.bundle.sha256
    effects = _finish_running(state, event.reason)
    if not event.ours:
        crashes = state.crashes[bundle] = state.crashes.get(bundle, 0) + 1
        effects.insert(0, CountCrash(bundle))
        if crashes >= CRASH_LIMIT:
            for key in [key for key, entry in state.jobs.items() if entry.job.bundle.sha256 == bundle]:
                effects += _remove(state, key, _quarantine(bundle, crashes))
    return effects + _start_next(state, event.now)


def _finish_running(state: AgentState, reason: str) -> list[Effect]:
    if state.running is None:
        return []
    entry = state.jobs.pop(state.running)
    state.running = None
    return [_report(entry.job, "failed", reason)]


def _remove(state: AgentState, key: Key, reason: str, *, report: bool = True) -> list[Effect]:
    entry = state.jobs.get(key)
    if entry is None:
        return []
    if entry.running:
        return [StopTraining(reason)]
    del state.jobs[key]
    wanted = {sha for other in state.jobs.values() for sha in other.missing}
    effects: list[Effect] = [StopFetch(sha) for sha in sorted(entry.missing - wanted)]
    return [*effects, _report(entry.job, "failed", reason)] if report else effects


def _report(job: Job, status: Literal["accepted", "failed", "rejected"], reason: str = "") -> Report:
    return Report(JobStatus(run=job.run, assignment=job.assignment, status=status, reason=reason))
