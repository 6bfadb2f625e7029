"""The stored report of a selection, for ``edge-coordinator explain``: every device, chosen or not, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np
from backports import zstd

from coordinator.errors import StoreError
from coordinator.scheduling.base import Choice, Note
from coordinator.scheduling.notes import NoteTable, as_table

_LEVEL = 1  # of Zstandard: the report is written at every selection and seldom read


class Report(msgspec.Struct, kw_only=True):
    """Why each device was chosen or not.

    Attributes:
        chosen: by device, with steps, role, deadline and byte budget.
        notes: by device, of the candidates: the reason, and what the selector computed.
        unfit: why a device is not eligible for the run (offline, lacks a codec), by device.
        busy: why an eligible device was no candidate (works on a job, waits, declined), by device.
    """

    chosen: dict[str, Choice] = {}
    notes: Mapping[str, Note] = {}
    unfit: dict[str, str] = {}
    busy: dict[str, str] = {}


class _Packed(msgspec.Struct, array_like=True):
    chosen: dict[str, Choice]
    unfit: dict[str, str]
    busy: dict[str, str]
    devices: list[str]
    texts: list[str]
    codes: bytes
    figures: dict[str, bytes]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(report: Report) -> bytes:
    """MessagePack and Zstandard. Notes travel as columns: about 10 bytes per device."""
    notes = as_table(report.notes)
    packed = _Packed(
        report.chosen,
        report.unfit,
        report.busy,
        list(notes.devices),
        list(notes.texts),
        notes.codes.astype("<u2").tobytes(),
        {name: column.tobytes() for name, column in notes.figures.items()},
    )
    return bytes(zstd.compress(_encoder.encode(packed), level=_LEVEL))


def reasons(report: Report) -> bytes:
    """Who was chosen or not and why, without figures: equal where two reports say the same in other numbers."""
    notes = as_table(report.notes)
    kinds = {name: text.partition(",")[0] for name, text in report.busy.items()}
    said = (sorted(report.chosen), report.unfit, kinds, notes.devices, notes.texts, notes.codes.tobytes())
    return hashlib.sha256(_encoder.encode(said)).digest()


def unpack(data: bytes) -> Report:
    """The report in these bytes.

    Raises:
        StoreError: they are none, or of a version that is not known here.
    """
    try:
        packed = _decoder.decode(zstd.decompress(data))
        count = len(packed.devices)
        codes = np.frombuffer(packed.codes, "<u2")
        figures = {name: np.frombuffer(column, "<f4") for name, column in packed.figures.items()}
        if any(len(column) != count for column in (codes, *figures.values())):
            raise StoreError("the report of a selection is damaged; its columns differ in length")
        if count and int(codes.max()) >= len(packed.texts):
            raise StoreError("the report of a selection is damaged; a reason is missing")
    except (zstd.ZstdError, msgspec.MsgspecError, ValueError) as error:
        raise StoreError(f"the report of a selection cannot be read, another version wrote it: {error}") from error
    return Report(
        chosen=packed.chosen,
        notes=NoteTable(packed.devices, packed.texts, codes, figures),
        unfit=packed.unfit,
        busy=packed.busy,
    )
