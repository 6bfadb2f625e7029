"""What a store can be asked: by the command line, by reports, by benchmarks. Read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sqlalchemy as sa

from coordinator.errors import UnknownRunError
from coordinator.events import AssignmentRow, DeviceRow, HistoryRow, RoundRow, RunRow, SelectionRow, UpdateRow
from coordinator.ledger import EnergySums
from coordinator.plan import Plan
from coordinator.store import rows as convert
from coordinator.store import tables
from coordinator.store.database import translated
from edge_runtime.messages import UpdateMeta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.ledger import LedgerRow
    from edge_runtime.messages import Role

_SUMMED = ("train_mj", "compress_mj", "other_mj", "radio_mj")
_GONE_S = 15.0  # a server that was silent for so long does not live


class StoredRun(msgspec.Struct, frozen=True):
    """A run with its plan, and why a user wants it to end, if one does."""

    row: RunRow
    plan: Plan
    stop_reason: str | None


class Queries:
    """The questions of :class:`coordinator.store.Store`."""

    _engine: sa.Engine
    _where: str

    def runs(self) -> list[StoredRun]:
        """All runs in order of submission."""
        return self._runs(sa.true())

    def run(self, run: str) -> StoredRun:
        """One run.

        Raises:
            UnknownRunError: no such run.
        """
        found = self._runs(tables.runs.c.run == run)
        if not found:
            names = ", ".join(entry.row.run for entry in self.runs()[-5:]) or "there are none"
            raise UnknownRunError(f"no run is called {run!r}; the latest: {names}")
        return found[0]

    def rounds(self, run: str, first: int = 0) -> list[RoundRow]:
        """The closed rounds of a run in order, from round ``first`` on."""
        t = tables.rounds
        return [
            convert.ROUNDS.row(entry)
            for entry in self._select(sa.select(t).where(t.c.run == run, t.c.round >= first).order_by(t.c.round))
        ]

    def selections(self, run: str, round_: int) -> list[SelectionRow]:
        """The selections of a round in order; none of a round that is more than ``SELECTION_ROUNDS_KEPT`` back."""
        t = tables.selections
        wanted = sa.select(t).where(t.c.run == run, t.c.round == round_).order_by(t.c.number)
        return [convert.SELECTIONS.row(entry) for entry in self._select(wanted)]

    def counted_updates(self, run: str, round_: int) -> list[UpdateRow]:
        """The updates that a closed round's model was made of, in update id order."""
        u = tables.updates
        wanted = sa.select(u).where(u.c.run == run, u.c.counted_round == round_, u.c.verdict == "counted")
        return sorted((convert.UPDATES.row(entry) for entry in self._select(wanted)), key=lambda row: row.update)

    def updates_of_round(self, run: str, round_: int) -> list[UpdateRow]:
        """The updates of the assignments that one round made, whenever they came."""
        u, a = tables.updates, tables.assignments
        names = sa.select(a.c.assignment).where(a.c.run == run, a.c.round == round_)
        wanted = sa.select(u).where(u.c.run == run, u.c.assignment.in_(names))
        return sorted((convert.UPDATES.row(entry) for entry in self._select(wanted)), key=lambda row: row.update)

    def update_counts(self, run: str) -> dict[str, int]:
        """How many updates of a run are counted, refused and pending."""
        u = tables.updates
        wanted = sa.select(u.c.verdict, sa.func.count().label("n")).where(u.c.run == run).group_by(u.c.verdict)
        return {entry["verdict"]: entry["n"] for entry in self._select(wanted)}

    def ledger(self, run: str, *, ended_early: int | None = None) -> list[tuple[LedgerRow, str, UpdateMeta | None]]:
        """What the jobs of a run drew, by round, device and assignment, each with what became of it and its update.

        That is the verdict on the update: counted, refused or pending; or "failed" where none came. ``ended_early``:
        only the last so many that ended before their last step.
        """
        t, u = tables.ledger, tables.updates
        same = sa.and_(*(t.c[name] == u.c[name] for name in ("run", "device", "assignment", "sequence")))
        wanted = sa.select(t, u.c.verdict, u.c.meta).select_from(t.outerjoin(u, same)).where(t.c.run == run)
        order = t.c.round, t.c.device, t.c.assignment, t.c.sequence
        if ended_early is None:
            found = self._select(wanted.order_by(*order))
        else:
            latest = wanted.where(t.c.stopped != "").order_by(*(column.desc() for column in order)).limit(ended_early)
            found = self._select(latest)[::-1]
        return [
            (
                convert.LEDGER.row(entry),
                entry["verdict"] or "failed",
                None if entry["meta"] is None else msgspec.json.decode(entry["meta"], type=UpdateMeta),
            )
            for entry in found
        ]

    def energy(self, run: str, by: Literal["round", "device"]) -> list[EnergySums]:
        """Sums over the ledger of a run, per round or device."""
        t = tables.ledger
        known = sa.func.count(sa.func.coalesce(t.c.train_mj, t.c.other_mj))
        sums = [sa.func.sum(t.c[name]).label(name) for name in _SUMMED]
        doubtful = sa.func.sum(sa.case((t.c.doubtful, 1), else_=0)).label("doubtful_jobs")
        stopped = sa.func.sum(sa.case((t.c.stopped != "", 1), else_=0)).label("stopped_jobs")
        wanted = (
            sa.select(t.c[by].label("key"), t.c.modelled, sa.func.count().label("jobs"), known.label("known_jobs"))
            .add_columns(doubtful, stopped, *sums)
            .where(t.c.run == run)
            .group_by(t.c[by], t.c.modelled)
        )
        return [_energy_sums(entry) for entry in self._select(wanted)]

    def assignments(self, run: str, round_: int) -> list[AssignmentRow]:
        """The assignments that one round made, oldest first."""
        a = tables.assignments
        wanted = sa.select(a).where(a.c.run == run, a.c.round == round_).order_by(a.c.assigned_unix_s, a.c.assignment)
        return [convert.ASSIGNMENTS.row(entry) for entry in self._select(wanted)]

    def roles(self, run: str) -> dict[str, Role]:
        """By assignment, those of a run that were no trainers."""
        a = tables.assignments
        wanted = sa.select(a.c.assignment, a.c.role).where(a.c.run == run, a.c.role != "trainer")
        return {entry["assignment"]: entry["role"] for entry in self._select(wanted)}

    def standing_assignments(self, run: str) -> list[AssignmentRow]:
        """All standing assignments of a run, those of a device in the order in which it got them."""
        a = tables.assignments
        wanted = sa.select(a).where(a.c.run == run, a.c.standing).order_by(a.c.assigned_unix_s, a.c.assignment)
        return [convert.ASSIGNMENTS.row(entry) for entry in self._select(wanted)]

    def open_assignments(self, run: str) -> int:
        """How many assignments of a run are open, standing ones too."""
        return self._count(tables.assignments, run, tables.assignments.c.status == "open")

    def updates_waiting(self, run: str, round_: int) -> int:
        """How many updates wait for the model of this round."""
        u = tables.updates
        return self._count(u, run, (u.c.counted_round == round_) & (u.c.verdict == "pending"))

    def declined(self, run: str) -> int:
        """How many jobs of a run their devices declined."""
        return self._count(tables.assignments, run, tables.assignments.c.status == "declined")

    def _count(self, table: sa.Table, run: str, condition: Any) -> int:
        wanted = sa.select(sa.func.count().label("n")).select_from(table).where(table.c.run == run, condition)
        return int(self._select(wanted)[0]["n"])

    def participants(self, run: str) -> int:
        """How many different devices were asked by a run."""
        a = tables.assignments
        return int(
            self._select(sa.select(sa.func.count(a.c.device.distinct()).label("n")).where(a.c.run == run))[0]["n"]
        )

    def server_running(self, now: float) -> bool:
        """Whether a server took care of the runs some seconds ago."""
        seen = [entry["last_seen_unix_s"] for entry in self._select(sa.select(tables.servers))]
        return any(abs(now - time) < _GONE_S for time in seen)

    def devices(self) -> list[DeviceRow]:
        """All devices that the server last knew, by name."""
        return [
            convert.DEVICES.row(entry)
            for entry in self._select(sa.select(tables.devices).order_by(tables.devices.c.device))
        ]

    def histories(self, run: str) -> list[HistoryRow]:
        """What a run knows of all devices that it ever asked, by name."""
        t = tables.histories
        wanted = sa.select(t).where(t.c.run == run).order_by(t.c.device)
        return [convert.HISTORIES.row(entry) for entry in self._select(wanted)]

    def is_active(self, run: str) -> bool:
        """Whether there is such a run and it has not ended."""
        r = tables.runs
        return bool(self._select(sa.select(r.c.run).where(r.c.run == run, r.c.status == "running")))

    def _runs(self, condition: Any) -> list[StoredRun]:
        t = tables.runs
        found = self._select(sa.select(t).where(condition).order_by(t.c.submitted_unix_s, t.c.run))
        return [
            StoredRun(convert.RUNS.row(entry), msgspec.json.decode(entry["plan"], type=Plan), entry["stop_reason"])
            for entry in found
        ]

    def _select(self, statement: Any) -> Sequence[Any]:
        with translated(self._where), self._engine.connect() as connection:
            return connection.execute(statement).mappings().all()


def _energy_sums(columns: Any) -> EnergySums:
    """PostgreSQL gives sums as decimals."""
    train, compress, other, radio = (None if columns[name] is None else int(columns[name]) for name in _SUMMED)
    return EnergySums(
        key=columns["key"],
        modelled=bool(columns["modelled"]),
        jobs=int(columns["jobs"]),
        known_jobs=int(columns["known_jobs"]),
        doubtful_jobs=int(columns["doubtful_jobs"]),
        stopped_jobs=int(columns["stopped_jobs"]),
        train_mj=train,
        compress_mj=compress,
        other_mj=other,
        radio_mj=radio,
    )
