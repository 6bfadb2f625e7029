"""Rounds of stored updates through the real server side: every round reads what the one before stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coordinator import events as e
from coordinator.aggregation import create_method, making
from coordinator.model_blobs import read_model, read_state
from edge_runtime.compression import Layout
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta
from edge_runtime.store.blobs import BlobStore
from tests.coordinator import helpers as h

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.plan import Plan

LAYOUT = Layout(("w", "b"), ((20, 5), (5,)))


class Sent(NamedTuple):
    """One device's update."""

    device: str
    vector: np.ndarray
    samples: int = 1
    staleness: int = 0
    steps: int = 1
    role: str = "trainer"
    codec: str = "raw"
    sequence: int = 0


def plan_of(
    method: str = "fedavg", options: dict[str, float] | None = None, *, client: str | None = None, **changes: Any
) -> Plan:
    """A plan with this server method, and the client method that belongs to it unless ``client`` is given."""
    client = client or ("fedamd" if method == "fedamd" else "fedavg")
    return h.plan(
        **{"server_method": method, "server_options": options or {}, "method": client, "target": 50, **changes}
    )


def vectors(count: int, seed: int = 0, size: int = LAYOUT.size) -> list[np.ndarray]:
    """Updates of devices that mostly agree, float32 ``[size]`` each."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=size)
    return [(common + 0.3 * rng.normal(size=size)).astype(np.float32) for _ in range(count)]


class Server:
    """A run's aggregation without the round machine: models, states and table rows go through blobs."""

    def __init__(
        self, folder: Path, plan: Plan, layout: Layout = LAYOUT, executor: Any = None, base: np.ndarray | None = None
    ) -> None:
        self.blobs, self.plan, self.layout, self.executor = BlobStore(folder), plan, layout, executor
        self.base = np.random.default_rng(9).normal(size=layout.size).astype(np.float32) if base is None else base
        self.made = making.make_initial(self.blobs, plan, self.base, layout)
        self.run = h.start(plan).run
        self.run.initial_model, self.run.initial_method_state = self.made.model, self.made.method_state
        self.version = 0
        self.table: dict[str, BlobRef] = {}
        self.roles: dict[str, str] = {}
        self.rounds: list[tuple[e.RoundRow, list[e.UpdateRow]]] = []
        self.held = {0: self.made.down or self.made.model}

    def model(self) -> np.ndarray:
        """The newest one."""
        return read_model(self.blobs, self.made.model, self.layout)

    def state(self) -> dict[str, np.ndarray]:
        """Of method and optimiser."""
        return read_state(self.blobs, self.made.method_state)

    def rows(self, sent: list[Sent]) -> list[e.UpdateRow]:
        """The updates, stored, in update id order."""
        return sorted((self._row(number, entry) for number, entry in enumerate(sent)), key=lambda row: row.update)

    def round(self, sent: list[Sent], members: int = 0) -> np.ndarray:
        """One round; gives the change of the model."""
        before = self.model()
        self.aggregate(self.rows(sent), members)
        return self.model().astype(np.float64) - before

    def effect(self, rows: list[e.UpdateRow], members: int = 0) -> e.Aggregate:
        """What the round machine asks for with these rows."""
        devices = {row.update.device for row in rows}
        return e.Aggregate(
            "run",
            self.version,
            self.version,
            self.made.model,
            rows,
            self.held,
            self.made.method_state,
            roles=self.roles,
            table={device: blob for device, blob in self.table.items() if device in devices},
            members=members,
        )

    def aggregate(self, rows: list[e.UpdateRow], members: int = 0) -> making.Made:
        """Carries out the effect for these rows."""
        effect = self.effect(rows, members)
        made = making.make_model(self.blobs, self.plan, effect, self.layout, executor=self.executor)
        record = e.RoundRow(
            run="run",
            round=self.version,
            version=self.version + 1,
            model=made.model,
            down=made.down,
            change=made.change,
            vector_sha256=made.vector_sha256,
            method_state=made.method_state,
            opened_unix_s=0,
            closed_unix_s=1,
            updates=len(rows),
            late_updates=0,
            samples=1,
        )
        self.made = made
        self.table.update(made.table)
        self.version += 1
        self.held = {**self.held, self.version: made.down or made.model}
        self.rounds.append((record, rows))
        return made

    def _row(self, number: int, sent: Sent) -> e.UpdateRow:
        version = max(0, self.version - sent.staleness)
        meta = UpdateMeta(
            round=self.version,
            model_version=version,
            samples=sent.samples,
            steps=0 if sent.role == "anchor" else sent.steps,
        )
        assignment = f"r{self.version}-{number}"
        update = UpdateId("run", sent.device, assignment, sent.sequence)
        channel = "anchor" if sent.role == "anchor" else "delta"
        if sent.role != "trainer":
            self.roles[assignment] = sent.role
        spec, layouts = CodecSpec(sent.codec), {channel: self.layout}
        data = encode(spec, {channel: sent.vector}, layouts, base_version=version, tag=update_tag(update)).data
        stored = self.blobs.put(data)
        return e.UpdateRow(
            update=update,
            blob=BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes),
            meta=meta,
            received_unix_s=0.0,
            verdict="counted",
            counted_round=self.version,
            weight=create_method(self.plan).weight(meta, self.version - version),
        )


def sent_by(updates: list[np.ndarray], **how: Any) -> list[Sent]:
    """One update per device."""
    return [Sent(f"d{number:03}", vector, **how) for number, vector in enumerate(updates)]
