"""What the agent does about jobs and updates, as a pure state machine: no I/O, clocks or threads.

``step(state, event)`` changes the state and gives effects; the daemon (or a simulated device) carries them out in
order. Jobs live in memory only: a coordinator that misses an update sends its job again. Updates are durable before
anything is said about them, so after a restart :func:`AgentState.restore` and ``Connected`` are all it takes.

A run has at most one update without a verdict here: a job that would make a second one waits until the first is
settled. Such a job makes the agent offer the first again at once, which the coordinator answers with its verdict as
soon as there is one; so nothing waits for a verdict that was lost on its way, and the job's deadline ends the rest.

A job that the device cannot afford, or that comes while its owner's limits forbid training, is declined: rejected with
the reason, and for how long it would be. One that meets its limit of joules, or heat, or a low battery, ends after the
step that runs and sends what it reached. Before the first step there is nothing to send, so the worker is killed; once
it encodes, it may finish.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from edge_runtime.agent.events import (
    BlobFailed,
    BlobReady,
    CloseUpdate,
    Connected,
    CountCrash,
    DoneArrived,
    Effect,
    Event,
    FetchBlob,
    ForgiveCrashes,
    JobArrived,
    JobCancelled,
    LimitReached,
    ModelLost,
    Offer,
    Paused,
    PhaseBegun,
    Report,
    SpoolUpdate,
    StartTraining,
    StopEarly,
    StopFetch,
    StopTraining,
    Tick,
    Trained,
    TrainingFailed,
    VerdictArrived,
    WorkerCrashed,
)
from edge_runtime.agent.limits import Decline
from edge_runtime.agent.pipe import Phase
from edge_runtime.messages import BlobRef, EnergyUse, Job, JobStatus, ModelRef, UpdateId
from edge_runtime.store.spool import SpooledUpdate, State

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    """A job and how far it is. ``missing``: hashes of the blobs that are still to come.

    ``phase`` is what the worker said last (None: it loads or evaluates); ``stopping``: it was asked to end early.
    """

    job: Job
    expires_at: float
    missing: set[str]
    running: bool = False
    phase: Phase | None = None
    stopping: bool = False

    @property
    def trains(self) -> bool:
        """Whether it makes an update with bytes; else it only evaluates."""
        return self.job.epochs is not None or self.job.steps is not None


def update_of(job: Job, device: str) -> UpdateId:
    """The identity of the update that a job makes."""
    return UpdateId(job.run, device, job.assignment, job.sequence)


class OpenUpdate(msgspec.Struct):
    """An update without a verdict; ``trained``: it has bytes, and is not only an evaluation."""

    state: State
    trained: bool = True


class AgentState(msgspec.Struct):
    """Everything the agent remembers between events."""

    device: str
    capabilities: Capabilities
    jobs: dict[Key, Entry] = {}
    updates: dict[UpdateId, OpenUpdate] = {}  # without a verdict
    crashes: dict[str, int] = {}  # by bundle, in a row
    running: Key | None = None
    paused: str = ""  # why no training may run now (heat, battery, memory); empty: it may
    paused_at: float = 0.0
    paused_for_s: float = 0.0

    @classmethod
    def restore(cls, device: str, capabilities: Capabilities, updates: Iterable[SpooledUpdate]) -> AgentState:
        """The state after a restart, from the open updates of the spool."""
        opened = {update.update: OpenUpdate(update.state, update.blob.size_bytes > 0) for update in updates}
        return cls(device, capabilities, updates=opened)

    def unsettled(self, run: str) -> list[UpdateId]:
        """Updates of a run, with bytes, that wait for their verdict; at most one but after faults of the disk."""
        return [name for name, update in self.updates.items() if update.trained and name.run == run]


def step(state: AgentState, event: Event) -> list[Effect]:  # noqa: C901, PLR0911, PLR0912 - one arm per event
    """Changes ``state`` by one event and gives what to do, in order."""
    match event:
        case JobArrived():
            return _job_arrived(state, event)
        case JobCancelled():
            return _remove(state, (event.run, event.assignment), "cancelled by the coordinator")
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
        case PhaseBegun(phase):
            if state.running is not None:
                state.jobs[state.running].phase = phase
            return []
        case LimitReached(reason):
            return _end_early(state, reason)
        case TrainingFailed(now, reason, energy):
            return _finish_running(state, reason, energy=energy) + _start_next(state, now)
        case ModelLost(now, energy):
            return _model_lost(state, energy) + _start_next(state, now)
        case WorkerCrashed():
            return _crashed(state, event)
        case DoneArrived(update):
            known = state.updates.get(update)
            if known is None or known.state != "ready":
                return []
            known.state = "delivered"
            return [CloseUpdate(update, "delivered", "")]
        case VerdictArrived(now, update, counted, reason):
            if state.updates.pop(update, None) is None:
                return []
            return [CloseUpdate(update, "counted" if counted else "refused", reason), *_start_next(state, now)]
        case Connected():
            return [Offer(update, push=False) for update in state.updates]
        case Paused():
            return _paused(state, event)
        case Tick(now):
            return _give_up_waiting(state, now) + _start_next(state, now)


def _job_arrived(state: AgentState, event: JobArrived) -> list[Effect]:
    job, key = event.job, (event.job.run, event.job.assignment)
    update = update_of(job, state.device)
    if event.known in ("ready", "delivered") or update in state.updates:  # a full disk may keep it out of the spool
        return [Offer(update, push=False)]
    if event.known is not None:  # a coordinator that knows this verdict no longer waits for the job
        return [_report(job, "rejected", _closed(event.known))]
    entry = state.jobs.get(key)
    if entry is not None and (entry.running or entry.job.sequence == job.sequence):
        return _job_repeated(state, entry, event)
    effects = [] if entry is None else _remove(state, key, "", report=False)  # an older one of a standing assignment
    reason = _unfit(state, event)
    if reason:
        return [*effects, _report(job, "rejected", reason)]
    declined = _declined(state, event)
    if declined is not None:
        return [*effects, _report(job, "rejected", declined.reason, declined_s=declined.for_s)]
    state.crashes.pop(job.bundle.sha256, None)  # the disk knows better: a quarantine may have been lifted
    if event.crashes:
        state.crashes[job.bundle.sha256] = event.crashes
    entry = Entry(_lean(job), event.now + job.deadline_s, {blob.sha256 for blob in _blobs(job)})
    state.jobs[key] = entry
    return [*effects, *_ask_for_verdicts(state, entry), *_fetch(job, entry.missing)]


def _job_repeated(state: AgentState, entry: Entry, event: JobArrived) -> list[Effect]:
    """The coordinator may have extended its deadline, cut its blobs anew, or chosen another way to the model."""
    entry.expires_at = max(entry.expires_at, event.now + event.job.deadline_s)
    if entry.running:
        return []
    effects = _ask_for_verdicts(state, entry)
    if event.held and not _unusable(event.job.model):
        before = entry.missing
        entry.missing = {blob.sha256 for blob in _blobs(event.job)} - (
            {blob.sha256 for blob in _blobs(entry.job)} - before
        )
        entry.job = _lean(event.job)
        effects += [*_stop_fetch(state, before), *_fetch(event.job, entry.missing)]
    return effects + _start_next(state, event.now)


def _ask_for_verdicts(state: AgentState, entry: Entry) -> list[Effect]:
    """The job has to wait for a verdict that may have been lost on its way."""
    return [Offer(name, push=False) for name in state.unsettled(entry.job.run)] if entry.trains else []


def _blobs(job: Job) -> list[BlobRef]:
    return [job.bundle, *job.model.blobs]


def _lean(job: Job) -> Job:
    """The job without the bytes that it brought: they go into the cache."""
    return msgspec.structs.replace(job, inline=b"") if job.inline else job


def _fetch(job: Job, missing: set[str]) -> list[Effect]:
    last = len(job.model.blobs)
    return [
        FetchBlob(blob, job.inline if number == last and number else b"")
        for number, blob in enumerate(_blobs(job))
        if blob.sha256 in missing
    ]


def _closed(verdict: str) -> str:
    return (
        f"the update of this assignment was already {verdict}: the coordinator's state is older than this device's; "
        "submit the plan under another name"
    )


def _paused(state: AgentState, event: Paused) -> list[Effect]:
    if event.reason and not state.paused:
        state.paused_at = event.now
    state.paused, state.paused_for_s = event.reason, event.for_s
    if event.reason and state.running is not None:
        return _end_early(state, event.reason) if event.keeps_work else [StopTraining(event.reason)]
    return _start_next(state, event.now)


def _end_early(state: AgentState, reason: str) -> list[Effect]:
    """The running job ends with what it reached, where it has trained anything."""
    if state.running is None:
        return []
    entry = state.jobs[state.running]
    if entry.phase is None:
        return [StopTraining(reason)]
    if entry.phase == "compress" or entry.stopping:
        return []
    entry.stopping = True
    return [StopEarly(reason)]


def _give_up_waiting(state: AgentState, now: float) -> list[Effect]:
    """Jobs that a pause kept waiting too long are declined, so that the coordinator can ask another device."""
    effects: list[Effect] = []
    if state.paused and now - state.paused_at >= PAUSE_PATIENCE_S:
        for key, entry in [(key, entry) for key, entry in state.jobs.items() if not entry.running]:
            effects += _remove(state, key, "", report=False)
            effects.append(_report(entry.job, "rejected", _pause(state), declined_s=state.paused_for_s))
    return effects


def _declined(state: AgentState, event: JobArrived) -> Decline | None:
    """What the device's owner, or what it has left, forbids."""
    if event.decline is not None:
        return event.decline
    return Decline(_pause(state), state.paused_for_s) if state.paused else None


def _pause(state: AgentState) -> str:
    return f"training is paused here: {state.paused}"


def _unfit(state: AgentState, event: JobArrived) -> str:  # noqa: PLR0911 - one reason each
    can, job = state.capabilities, event.job
    for kind, name, known in (
        ("dataset", job.dataset, can.datasets),
        ("codec", job.codec, can.codecs),
        ("method", job.method, can.methods),
    ):
        if name not in known:
            return f"{kind} {name!r} is not on this device (it has {', '.join(sorted(known)) or 'none'})"
    if not math.isfinite(job.deadline_s):
        return f"a deadline of {job.deadline_s} s is no duration"
    size = max(blob.size_bytes for blob in _blobs(job))
    if size > can.blob_limit_bytes:
        return f"blob of {size} bytes is over this device's limit of {can.blob_limit_bytes}"
    if _unusable(job.model):
        return _unusable(job.model)
    if not event.held:
        return _not_held(job)
    if event.crashes >= CRASH_LIMIT:
        return _quarantine(job.bundle.sha256, event.crashes)
    if len(state.jobs) >= QUEUE_LIMIT:
        return f"the queue of this device is full ({QUEUE_LIMIT} jobs)"
    return ""


def _not_held(job: Job) -> str:
    return (
        f"the job builds on model version {job.model.base} of run {job.run!r}, which this device does not hold; "
        "send the whole model"
    )


def _unusable(model: ModelRef) -> str:
    if model.base is None and len(model.blobs) != 1:
        return f"the job names {len(model.blobs)} blobs for a whole model; one is needed"
    if model.base is not None and model.vector_sha256 is None:
        return f"the job builds on model version {model.base}, but does not say which hash must come out"
    return ""


def _quarantine(bundle: str, crashes: int) -> str:
    return f"bundle {bundle[:12]} crashed the worker {crashes} times and is in quarantine here"


def _start_next(state: AgentState, now: float) -> list[Effect]:
    effects: list[Effect] = []
    for key in [key for key, entry in state.jobs.items() if entry.expires_at <= now and not entry.running]:
        cause = ""
        if state.jobs[key].trains and state.unsettled(key[0]):
            cause = ": an earlier update of this run still waits for its verdict"
        effects += _remove(state, key, f"the deadline passed before training could start{cause}")
    if state.running is not None or state.paused:
        return effects
    ready = [
        (-entry.job.priority, order, key)
        for order, (key, entry) in enumerate(state.jobs.items())
        if not entry.missing and not (entry.trains and state.unsettled(key[0]))
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
    update = update_of(entry.job, state.device)
    state.updates[update] = OpenUpdate("ready", trained=entry.trains)
    spooled = SpooledUpdate(update=update, file=event.file, blob=event.blob, meta=event.meta, key=event.key)
    effects: list[Effect] = [SpoolUpdate(spooled, event.change), Offer(update, push=True)]
    if entry.job.bundle.sha256 in state.crashes:
        del state.crashes[entry.job.bundle.sha256]
        effects.append(ForgiveCrashes(entry.job.bundle.sha256))
    return effects + _start_next(state, event.now)


def _crashed(state: AgentState, event: WorkerCrashed) -> list[Effect]:
    if state.running is None:
        return _start_next(state, event.now)
    bundle = state.jobs[state.running].job.bundle.sha256
    effects = _finish_running(state, event.reason, energy=event.energy)
    if not event.ours:
        crashes = state.crashes[bundle] = state.crashes.get(bundle, 0) + 1
        effects.insert(0, CountCrash(bundle))
        if crashes >= CRASH_LIMIT:
            for key in [key for key, entry in state.jobs.items() if entry.job.bundle.sha256 == bundle]:
                effects += _remove(state, key, _quarantine(bundle, crashes))
    return effects + _start_next(state, event.now)


def _finish_running(
    state: AgentState, reason: str, status: Literal["failed", "rejected"] = "failed", energy: EnergyUse | None = None
) -> list[Effect]:
    if state.running is None:
        return []
    entry = state.jobs.pop(state.running)
    state.running = None
    return [_report(entry.job, status, reason, energy)]


def _model_lost(state: AgentState, energy: EnergyUse | None) -> list[Effect]:
    """Rejected as it would be if it came now, so that the coordinator sends the whole model."""
    if state.running is None:
        return []
    return _finish_running(state, _not_held(state.jobs[state.running].job), "rejected", energy)


def _remove(state: AgentState, key: Key, reason: str, *, report: bool = True) -> list[Effect]:
    entry = state.jobs.get(key)
    if entry is None:
        return []
    if entry.running:
        return [StopTraining(reason)]
    del state.jobs[key]
    effects = _stop_fetch(state, entry.missing)
    return [*effects, _report(entry.job, "failed", reason)] if report else effects


def _stop_fetch(state: AgentState, missing: set[str]) -> list[Effect]:
    wanted = {sha for other in state.jobs.values() for sha in other.missing}
    return [StopFetch(sha) for sha in sorted(missing - wanted)]


def _report(
    job: Job,
    status: Literal["failed", "rejected"],
    reason: str = "",
    energy: EnergyUse | None = None,
    *,
    declined_s: float | None = None,
) -> Report:
    said = JobStatus(run=job.run, assignment=job.assignment, status=status, reason=reason, energy=energy)
    return Report(said if declined_s is None else msgspec.structs.replace(said, declined_s=declined_s))
