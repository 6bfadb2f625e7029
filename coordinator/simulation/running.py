"""Runs one simulation from plan and traces to a report."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from coordinator.aggregation import create_method
from coordinator.aggregation.making import recompute
from coordinator.evaluation_numbers import accuracy, mean_loss
from coordinator.executors.files import temporary_folder
from coordinator.executors.inline import InlineExecutor
from coordinator.model_blobs import read_held
from coordinator.simulation.echo import EchoTrainer
from coordinator.simulation.faults import NO_FAULTS
from coordinator.simulation.report import SimulationReport
from coordinator.simulation.settings import START_UNIX_S, Settings
from coordinator.simulation.store import BrokenRuleError, MemoryBlobs, MemoryStore
from coordinator.simulation.training import RealTrainer
from coordinator.simulation.world import World
from coordinator.submission import submit
from edge_runtime.bundle import Bundle
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from coordinator.events import RunRow
    from coordinator.executors.base import Executor
    from coordinator.plan import Plan
    from coordinator.simulation.data import Shares
    from coordinator.simulation.faults import FaultPlan
    from coordinator.simulation.report import Progress, VersionReport
    from coordinator.simulation.traces import Traces
    from coordinator.store import Store
    from edge_runtime.messages import BlobRef, Evaluation


def simulate(
    plan: Plan,
    traces: Traces,
    settings: Settings | None = None,
    *,
    shares: Shares | None = None,
    faults: FaultPlan = NO_FAULTS,
    executor: Executor | None = None,
    on_version: Callable[[VersionReport], bool] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SimulationReport:
    """Simulates one run of a plan.

    Args:
        plan: as for production; ``bundle`` and ``test_set`` are paths.
        traces: of all devices.
        settings: of the virtual world.
        shares: training data by device, in the order of the traces; None: no training, updates are echoes
            (:mod:`coordinator.simulation.echo`), and nothing is evaluated.
        faults: what goes wrong.
        executor: where devices train and updates are summed; None: this process. Any gives the same report.
        on_version: is told of every version as it is made, and again once it was evaluated; true ends the run.
        on_progress: is told every few seconds of this machine how far the run is.

    Raises:
        EdgeError: plan, bundle, test set or data cannot be used, as :func:`coordinator.submission.submit` says.
        BrokenRuleError: the run did what must never happen; a bug.
    """
    settings = settings or Settings()
    if shares is not None and len(shares.starts) != len(traces.devices) + 1:
        raise ConfigError(
            f"data is shared out among {len(shares.starts) - 1} devices, the traces have {len(traces.devices)}"
        )
    if shares is None:
        plan = msgspec.structs.replace(plan, test_set=None)
    folder = temporary_folder("simulation")
    own = InlineExecutor() if executor is None else None
    try:
        used = executor or cast("Executor", own)
        simulation = _Simulation(plan, traces, settings, shares=shares, faults=faults, executor=used, folder=folder)
        return simulation.run(on_version, on_progress)
    finally:
        if own is not None:
            own.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Simulation:
    def __init__(
        self,
        plan: Plan,
        traces: Traces,
        settings: Settings,
        *,
        shares: Shares | None,
        faults: FaultPlan,
        executor: Executor,
        folder: Path,
    ) -> None:
        self._plan, self._traces, self._settings, self._shares = plan, traces, settings, shares
        self._faults, self._executor = faults, executor
        self._store = MemoryStore(MemoryBlobs(folder / "blobs"))
        submission = _Submission(self._store.blobs)
        submit(cast("Store", submission), plan, now=START_UNIX_S)
        assert submission.row is not None
        self._run = submission.row
        self._bundle = Bundle.open(self._store.blobs.path(self._run.bundle.sha256))
        self._test_set = None
        if self._run.test_set is not None:
            self._test_set = executor.share(self._store.blobs.path(self._run.test_set.sha256).read_bytes())
        self._trainer = self._make_trainer()

    def _make_trainer(self) -> RealTrainer | EchoTrainer:
        blobs, bundle = self._store.blobs, self._bundle
        if self._shares is not None:
            return RealTrainer(self._executor, self._run.bundle, blobs, self._shares, blobs.folder.parent / "updates")
        method, layout = create_method(self._plan), bundle.layout()
        channels = {"trainer": method.channels, **method.roles}
        return EchoTrainer(
            layout,
            cast("Any", channels),
            lambda blob, version: read_held(blobs, self._plan, blob, version, layout),
            self._settings.seed,
        )

    def run(
        self,
        on_version: Callable[[VersionReport], bool] | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> SimulationReport:
        """Lets the run go to its end and looks at it."""
        began = time.perf_counter()
        world = World(
            plan=self._plan,
            run=self._run,
            bundle=self._bundle,
            traces=self._traces,
            settings=self._settings,
            faults=self._faults,
            store=self._store,
            trainer=self._trainer,
            shares=self._shares,
            evaluate=self._evaluate,
            executor=self._executor if self._executor.workers > 1 else None,
            on_version=on_version,
            on_progress=on_progress,
        )
        events = world.run_to_end()
        wall_s = time.perf_counter() - began
        world.recorder.end()
        if world.result is None:
            raise BrokenRuleError(f"nothing is left to happen after {world.timeline.now_s:g} s, and the run goes on")
        report = self._report(world, events, wall_s)
        self._check(report)
        if self._shares is not None and self._settings.device_accuracy:
            self._evaluate_devices(report)
        self._trainer.close()
        return report

    def _report(self, world: World, events: int, wall_s: float) -> SimulationReport:
        assert world.result is not None
        run = self._store.run
        assert run is not None
        outcomes, devices, jobs = world.recorder.outcomes(self._store)
        for virtual in world.devices:
            device = devices[virtual.name]
            device.lost_to_battery, device.samples = virtual.lost_to_battery, world.samples(virtual.number)
        return SimulationReport(
            run=run.run,
            status=world.result[0],
            reason=world.result[1],
            plan=self._plan.name,
            seed=self._settings.seed,
            devices=len(devices),
            step_s=self._settings.step_s,
            step_source=self._settings.step_source,
            training=self._shares is not None,
            virtual_s=world.timeline.now_s,
            wall_s=wall_s,
            trained=world.recorder.trained,
            lost_to_battery=world.recorder.lost_to_battery,
            modelled_joules=world.recorder.joules,
            outcomes=outcomes,
            faults=world.faults.struck,
            events=events,
            server_steps=world.server.steps,
            final_model_sha256=run.model.sha256,
            final_vector_sha256=run.vector_sha256,
            versions=[world.recorder.versions[version] for version in sorted(world.recorder.versions)],
            device_reports=list(devices.values()),
            assignments=jobs,
        )

    def _check(self, report: SimulationReport) -> None:
        """What must hold of every run."""
        pending = [row.update for row in self._store.updates.values() if row.verdict == "pending"]
        if pending:
            raise BrokenRuleError(f"update {pending[0]} never got a verdict")
        counted = [row for row in self._store.updates.values() if row.verdict == "counted"]
        in_rounds = sum(row.updates for row in self._store.round_rows.values())
        if len(counted) != in_rounds or len(counted) != sum(one.counted for one in report.device_reports):
            raise BrokenRuleError(f"{len(counted)} updates are counted, but the rounds took {in_rounds}")
        still = [row.assignment for row in self._store.all_assignments() if row.status == "open"]
        if still:
            raise BrokenRuleError(f"assignment {still[0]} is still open after the end")
        if self._plan.retain_updates == "all":
            report.verified_versions = self._recompute()

    def _recompute(self) -> int:
        assert self._store.run is not None
        rounds = ((row, self._store.counted_updates("", row.round)) for row in self._store.rounds(""))
        count = 0
        for made in recompute(self._store.blobs, self._plan, self._store.run, rounds, self._bundle.layout()):
            if not made.same:
                raise BrokenRuleError(f"version {made.round.version} made again from its updates is another model")
            count += 1
        return count

    def _evaluate(self, model: BlobRef) -> Future[Evaluation]:
        assert self._test_set is not None
        assert isinstance(self._trainer, RealTrainer)
        return self._trainer.evaluate(model, self._test_set)

    def _evaluate_devices(self, report: SimulationReport) -> None:
        """The final model on all data of every device."""
        assert self._store.run is not None
        assert isinstance(self._trainer, RealTrainer)
        found = self._trainer.evaluate_devices(self._store.run.model, len(report.device_reports))
        for device, evaluation in zip(report.device_reports, found, strict=True):
            device.final_accuracy, device.final_loss = accuracy(evaluation), mean_loss(evaluation)


class _Submission:
    """The part of a store that :func:`coordinator.submission.submit` uses."""

    def __init__(self, blobs: MemoryBlobs) -> None:
        self.blobs = blobs
        self.row: RunRow | None = None

    def submit(self, plan: Plan, row: RunRow) -> str:
        """Names the run as a server does that never had one of this plan."""
        name = f"{plan.name[:56]}-1"
        self.row = msgspec.structs.replace(row, run=name)
        return name
