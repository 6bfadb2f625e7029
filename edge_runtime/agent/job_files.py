"""What jobs need of the device's disk: blobs, held models, the spool; and the request that the worker gets."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from edge_runtime.agent import pipe
from edge_runtime.agent.config import MB
from edge_runtime.errors import StorageError

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.agent.jobs import AgentState
    from edge_runtime.messages import BlobRef, Job
    from edge_runtime.store.blobs import BlobStore
    from edge_runtime.store.models import HeldModels
    from edge_runtime.store.spool import Spool

log = logging.getLogger("edge.agent")


def blobs_of(job: Job) -> list[BlobRef]:
    """Everything that comes over the network for a job."""
    return [job.bundle, *job.model.blobs]


class JobFiles:
    """The disk, for one device's jobs.

    Args:
        config: quotas, datasets.
        jobs: what the device works on.
        spool: updates and states of runs.
        cache: bundles and models as they came.
        models: versions that jobs can build on.
    """

    def __init__(
        self, config: AgentConfig, jobs: AgentState, spool: Spool, cache: BlobStore, models: HeldModels
    ) -> None:
        self._config, self._jobs = config, jobs
        self._spool, self._cache, self._models = spool, cache, models

    def holds_base(self, job: Job) -> bool:
        """Whether the version that a job builds on is here."""
        return job.model.base is None or self._models.has(job.run, job.model.base)

    def missing_bytes(self, job: Job) -> int:
        """What would have to be fetched for a job."""
        lacking = sum(blob.size_bytes for blob in blobs_of(job) if not self._cache.has(blob.sha256))
        return max(0, lacking - len(job.inline))

    def pinned(self, run: str) -> list[int]:
        """Versions of a run's model that waiting jobs build on, or updates that may yet come back."""
        waiting = {entry.job.model.base for entry in self._jobs.jobs.values() if entry.job.run == run}
        return sorted({*self._spool.needed_versions(run), *(base for base in waiting if base is not None)})

    def make_room(self, blob: BlobRef) -> None:
        """Before a blob comes, blobs and held models together go below their quota: models of other runs first."""
        if self._cache.has(blob.sha256):
            return
        room = int(self._config.limits.cache_mb * MB) - blob.size_bytes
        jobs = [entry.job for entry in self._jobs.jobs.values()]
        needed = {blob.sha256 for job in jobs for blob in blobs_of(job)}
        try:
            pinned = {run: self.pinned(run) for run in self._spool.runs()}
            self._models.evict(max(0, room - self._cache.used_bytes()), pinned, {job.run for job in jobs})
            self._cache.evict(max(0, room - self._models.used_bytes()), needed)
        except (OSError, StorageError) as error:
            log.error("%s: cannot be cleaned (%s)", self._cache.folder, error)  # noqa: TRY400 - one line

    def spool_is_full(self, job: Job) -> str:
        """Why a job cannot begin for want of room; empty: it can. Raises StorageError if the disk cannot be used."""
        spool_mb = self._config.limits.spool_mb
        if self._spool.make_room(int(spool_mb * MB), job.run):
            return ""
        return (
            f"the spool holds more than limits.spool_mb = {spool_mb:g}: updates that wait for their verdict, "
            "or for a job that sends them again, come first"
        )

    def request(self, job: Job) -> pipe.TrainRequest:
        """What the worker needs for a job whose blobs are here. Raises StorageError if the disk cannot be used."""
        return pipe.TrainRequest(
            job=job,
            device=self._config.device,
            bundle_path=str(self._cache.path(job.bundle.sha256)),
            model_paths=[str(self._cache.path(blob.sha256)) for blob in job.model.blobs],
            output_folder=str(self._spool.folder),
            dataset=next(data for data in self._config.data if data.name == job.dataset),
            models_folder=str(self._models.folder),
            state_path=str(self._spool.run_state(job.run) or ""),
            refused=[
                pipe.RefusedUpdate(update=refused.update, path=str(self._spool.path(refused)), key=refused.key)
                for refused in self._spool.refused(job.run)
            ],
            pinned=self.pinned(job.run),
            threads=self._config.limits.worker_threads,
            code_dir=self._config.code_dir,
        )

    def empty_update(self) -> tuple[str, str]:
        """Path and SHA-256 of an update without bytes: the result of an evaluation. Raises OSError."""
        path = self._spool.folder / "empty.update"
        path.touch()
        return str(path), hashlib.sha256(b"").hexdigest()
