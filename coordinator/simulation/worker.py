"""The worker of a virtual device: how long its training takes, what it draws, and how it ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coordinator.errors import ExecutorError
from coordinator.simulation.tasks import Order
from edge_runtime.agent import events
from edge_runtime.errors import EdgeError
from edge_runtime.messages import EnergyUse

if TYPE_CHECKING:
    from coordinator.simulation.agent import VirtualAgent
    from coordinator.simulation.device import VirtualDevice
    from coordinator.simulation.tasks import Refused
    from coordinator.simulation.training import Handle
    from edge_runtime.messages import Job

EVALUATION_COST = 1 / 3  # of a training step: forward only


class _Training(NamedTuple):
    order: Order
    handle: Handle
    number: int
    began_s: float
    train_s: float
    wait_s: float  # evaluating, before it


class VirtualWorker:
    """At most one training at a time. Joules are of the device model."""

    __slots__ = ("_agent", "_device", "_number", "_training", "_world")

    def __init__(self, device: VirtualDevice, agent: VirtualAgent) -> None:
        self._device, self._agent, self._world = device, agent, device.world
        self._training: _Training | None = None
        self._number = 0

    def start(self, job: Job, state: bytes, refused: tuple[Refused, ...]) -> None:
        """Begins a job, with what the run kept, and what is to be sent again."""
        world, device = self._world, self._device
        now, samples = world.timeline.now_s, world.samples(device.number)
        steps = planned_steps(job, samples)
        order = Order(
            device=device.name,
            number=device.number,
            job=job,
            model=world.server.whole_model(job),
            samples=samples,
            steps=steps,
            state=state,
            refused=refused,
        )
        watts, joules = device.trace.training_watts + device.trace.idle_watts, self._joule_limit(job)
        if watts * steps * device.step_s > joules:
            most = max(1, math.ceil(joules / (watts * device.step_s)))
            order = order._replace(stop_after=most, stopped=f"it drew {joules:g} J, all that it may")
            steps = min(steps, most)
        training = self._begin(order, now, steps)
        fault = world.faults.of_job((job.assignment, job.sequence))
        if fault is not None:
            ends = now + fault.share * (training.train_s + training.wait_s)
            world.timeline.at(ends, self._strike, fault.kind, training.number)

    def _joule_limit(self, job: Job) -> float:
        """What the job may draw, by its plan and the device's owner."""
        limits = (job.joule_limit, self._device.conditions.joules_left())
        return min((limit for limit in limits if limit is not None), default=math.inf)

    def stop_early(self, reason: str) -> None:
        """Training ends after the step that runs."""
        training = self._training
        if training is None:
            return
        passed = self._world.timeline.now_s - training.began_s - training.wait_s
        steps = max(1, math.floor(passed / self._device.step_s) + 1)
        if steps < training.order.steps:
            training.handle.cancel()
            self._begin(training.order._replace(stop_after=steps, stopped=reason), training.began_s, steps)

    def kill(self) -> EnergyUse | None:
        """Breaks training off; what it drew, None if there was none."""
        training = self._training
        if training is None:
            return None
        training.handle.cancel()
        energy = self._end(training, broken_off=True)
        self._device.worked(energy, None)
        return energy

    def _begin(self, order: Order, began_s: float, steps: int) -> _Training:
        self._number += 1
        train_s = steps * self._device.step_s
        wait_s = evaluation_steps(order.job, order.samples) * EVALUATION_COST * self._device.step_s
        handle = self._world.trainer.start(order)
        self._training = training = _Training(order, handle, self._number, began_s, train_s, wait_s)
        self._device.train(training=True)
        self._world.timeline.at(began_s + wait_s + train_s, self._done, self._number)
        return training

    def _strike(self, kind: str, number: int) -> None:
        """A fault hits this training, if it is still going on."""
        if self._training is None or self._training.number != number:
            return
        self._world.faults.note(kind)
        if kind == "agents":
            self._device.restart()
            return
        energy = self.kill()
        self._agent.step(
            events.WorkerCrashed(self._world.timeline.now_s, "the worker crashed (a fault)", False, energy)
        )

    def _done(self, number: int) -> None:
        training = self._training
        if training is None or training.number != number:
            return
        try:
            result = training.handle.result()
        except ExecutorError:
            raise  # a fault of this machine, not of the virtual one
        except EdgeError as error:
            energy = self._end(training, broken_off=True)
            self._device.worked(energy, None)
            self._agent.step(events.TrainingFailed(self._world.timeline.now_s, str(error), energy))
            return
        radio_j = self._device.trace.radio_joules_per_mb_up * result.size_bytes / 1e6
        energy = msgspec.structs.replace(self._end(training, broken_off=False), radio_mj=round(1000 * radio_j))
        meta = msgspec.structs.replace(
            result.meta, train_ms=round(1000 * training.train_s), encode_cpu_ms=0, energy=energy
        )
        self._world.recorder.trained += 1
        self._device.worked(energy, training.order.samples)
        self._agent.trained(training.order.job, result, meta)

    def _end(self, training: _Training, *, broken_off: bool) -> EnergyUse:
        """What a training that ends now has drawn; broken off, it may be done again, and this was in vain."""
        self._training = None
        seconds, trace, job = self._world.timeline.now_s - training.began_s, self._device.trace, training.order.job
        self._device.train(training=False)
        key = None if broken_off else (job.assignment, job.sequence)
        self._world.recorder.spend(self._device.number, key, "training", trace.training_watts * seconds)
        watts = trace.training_watts + trace.idle_watts
        train_s = max(0.0, seconds - training.wait_s)
        return EnergyUse(
            train_mj=round(1000 * watts * train_s),
            other_mj=round(1000 * watts * (seconds - train_s)),
            idle_mw=round(1000 * trace.idle_watts),
            sensor="model",
            modelled=True,
        )


def planned_steps(job: Job, samples: int) -> int:
    """Steps of a job on so many samples; one pass for an anchor, 0 where it only evaluates."""
    left = samples if job.max_samples is None else min(samples, job.max_samples)
    left = max(1, round(left * (1.0 - job.holdout_fraction)))
    used = left - left % job.batch_size if job.last_batch == "drop" and job.role == "trainer" else left
    passes = -(-max(used, 1) // job.batch_size)
    if job.role == "anchor":
        return passes
    return job.steps if job.steps is not None else (job.epochs or 0) * passes


def evaluation_steps(job: Job, samples: int) -> int:
    """Batches of the hold-out that a job evaluates first, or of all samples where it does nothing else."""
    trains = job.epochs is not None or job.steps is not None or job.role == "anchor"
    if trains and not (job.evaluate and job.holdout_fraction > 0):
        return 0
    share = job.holdout_fraction if job.holdout_fraction > 0 else 1.0
    return -(-max(1, round(samples * share)) // job.batch_size)
