"""Why every candidate was chosen or not: columns that cost little to make, and become words when somebody reads them.

A selection looks at thousands of devices, and few of its notes are ever read. So a selector writes one code per device
and one array per figure; the sentence of a code may name figures, as in ``"would need {seconds:.0f} s"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from coordinator.scheduling.base import Note

if TYPE_CHECKING:
    import numpy.typing as npt

    Codes: TypeAlias = npt.NDArray[np.uint16]
    Figures: TypeAlias = npt.NDArray[np.float32]
    Column: TypeAlias = npt.NDArray[np.float64]
    Where: TypeAlias = npt.NDArray[np.bool_] | npt.NDArray[np.intp]

_LARGEST = float(np.finfo(np.float32).max)


class NoteTable(Mapping[str, Note]):
    """Notes as columns; reads like a dictionary. NaN: this figure was not computed for this device.

    Attributes:
        devices: names, ``n`` of them.
        texts: sentences that codes count through; the first one is empty and stands for no note.
        codes: uint16 ``[n]``.
        figures: by name, float32 ``[n]``.
    """

    def __init__(
        self, devices: Sequence[str], texts: Sequence[str], codes: Codes, figures: Mapping[str, Figures]
    ) -> None:
        self.devices = devices
        self.texts = texts
        self.codes = codes
        self.figures = figures
        self._index: dict[str, int] | None = None

    def __getitem__(self, device: str) -> Note:
        if self._index is None:
            self._index = {name: number for number, name in enumerate(self.devices)}
        row = self._index[device]
        if not self.codes[row]:
            raise KeyError(device)
        values = {name: float(column[row]) for name, column in self.figures.items()}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        return Note(self.texts[int(self.codes[row])].format_map(values), known)

    def __iter__(self) -> Iterator[str]:
        return (name for name, code in zip(self.devices, self.codes.tolist(), strict=True) if code)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.codes))


class Marks:
    """What a selector notes while it works; a later mark of a device replaces the one before."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices
        self._texts = [""]
        self._codes = np.zeros(len(devices), np.uint16)
        self._figures: dict[str, Figures] = {}

    def mark(self, where: Where, text: str) -> None:
        """The reason of these devices; ``text`` may name figures."""
        self._texts.append(text)
        self._codes[where] = len(self._texts) - 1

    def figure(self, name: str, values: Column | float, where: Where | None = None) -> None:
        """A figure of all devices, or of those ``where`` says (then as many values)."""
        if where is None:
            self._figures[name] = _narrowed(np.broadcast_to(np.asarray(values, float), self._codes.shape))
            return
        column = self._figures.setdefault(name, np.full(self._codes.shape, np.nan, np.float32))
        column[where] = _narrowed(np.asarray(values, float))

    def table(self) -> NoteTable:
        """All that was noted."""
        return NoteTable(self.devices, self._texts, self._codes, self._figures)


def as_table(notes: Mapping[str, Note]) -> NoteTable:
    """Notes of any selector as columns."""
    if isinstance(notes, NoteTable):
        return notes
    codes = {"": 0}
    devices = list(notes)
    numbers = [codes.setdefault(_literal(note.reason) or "chosen or not", len(codes)) for note in notes.values()]
    names = sorted({name for note in notes.values() for name in note.figures})
    figures = {
        name: _narrowed(np.array([note.figures.get(name, np.nan) for note in notes.values()], float)) for name in names
    }
    return NoteTable(devices, list(codes), np.array(numbers, np.uint16), figures)


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _narrowed(values: Column) -> Figures:
    """As float32 with half its mantissa: about four digits, which is what is shown, and packs well."""
    clipped = np.clip(values, -_LARGEST, _LARGEST).astype("<f4")
    bits: npt.NDArray[np.uint32] = clipped.view("<u4") & np.uint32(0xFFFFF000)
    return bits.view("<f4")
