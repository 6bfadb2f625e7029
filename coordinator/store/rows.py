"""Between rows (msgspec structs) and table columns: one converter per kind of row, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

import msgspec

from coordinator import events
from coordinator.events import (
    AssignmentRow,
    DeviceRow,
    HistoryRow,
    HoldingRow,
    RoundRow,
    RunRow,
    SelectionRow,
    TableRow,
    UpdateRow,
)
from coordinator.ledger import LedgerRow
from coordinator.store import tables
from edge_runtime.messages import UpdateId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Table

R = TypeVar("R", bound=msgspec.Struct)


class Converter(Generic[R]):
    """Converts one kind of row. Nested structs become JSON text; an update id becomes its four columns."""

    def __init__(self, kind: type[R], table: Table) -> None:
        self.kind = kind
        self.table = table
        hints = get_type_hints(kind, vars(events))
        self._plain = [name for name in kind.__struct_fields__ if name != "update" and _is_plain(hints[name])]
        nested = [name for name in kind.__struct_fields__ if name != "update" and name not in self._plain]
        self._nested = {name: msgspec.json.Decoder(hints[name]) for name in nested}
        self._encode = msgspec.json.Encoder().encode

    def columns(self, row: R) -> dict[str, Any]:
        """Column values of a row."""
        values = {name: getattr(row, name) for name in self._plain}
        for name in self._nested:
            value = getattr(row, name)
            values[name] = None if value is None else self._encode(value).decode()
        if isinstance(row, UpdateRow):
            update = row.update
            values.update(
                run=update.run,
                device=update.device,
                assignment=update.assignment,
                sequence=update.sequence,
            )
        if isinstance(row, UpdateRow | TableRow):
            values["sha256"] = row.blob.sha256
        return values

    def row(self, columns: Mapping[str, Any]) -> R:
        """The row of a table's column values."""
        values = {name: columns[name] for name in self._plain}
        for name, decoder in self._nested.items():
            text = columns[name]
            values[name] = None if text is None else decoder.decode(text)
        if self.kind is UpdateRow:
            values["update"] = UpdateId(columns["run"], columns["device"], columns["assignment"], columns["sequence"])
        return self.kind(**values)


def _is_plain(hint: Any) -> bool:
    info = msgspec.inspect.type_info(hint)
    parts = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    plain = (
        msgspec.inspect.StrType,
        msgspec.inspect.IntType,
        msgspec.inspect.FloatType,
        msgspec.inspect.BoolType,
        msgspec.inspect.BytesType,
        msgspec.inspect.LiteralType,
        msgspec.inspect.NoneType,
    )
    return all(isinstance(part, plain) for part in parts)


RUNS = Converter(RunRow, tables.runs)
ASSIGNMENTS = Converter(AssignmentRow, tables.assignments)
UPDATES = Converter(UpdateRow, tables.updates)
LEDGER = Converter(LedgerRow, tables.ledger)
HOLDINGS = Converter(HoldingRow, tables.holdings)
HISTORIES = Converter(HistoryRow, tables.histories)
SELECTIONS = Converter(SelectionRow, tables.selections)
TABLE = Converter(TableRow, tables.method_table)
ROUNDS = Converter(RoundRow, tables.rounds)
DEVICES = Converter(DeviceRow, tables.devices)
BY_KIND: dict[type, Converter[Any]] = {
    entry.kind: entry
    for entry in (
        RUNS,
        ASSIGNMENTS,
        UPDATES,
        LEDGER,
        HOLDINGS,
        HISTORIES,
        SELECTIONS,
        TABLE,
        ROUNDS,
        DEVICES,
    )
}
