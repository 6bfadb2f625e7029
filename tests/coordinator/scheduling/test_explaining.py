"""Reports of selections: stored small, read back in words."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.errors import StoreError
from coordinator.scheduling import SELECTORS, Choice, Note
from coordinator.scheduling.explaining import Report, pack, unpack
from coordinator.scheduling.notes import Marks
from tests.coordinator.scheduling import world as w


def test_reports_come_back_in_words():
    """What a selector noted, who was chosen, and why others were no candidates survive storage."""
    beats = [w.beat(), w.on_battery(3), w.beat(declines=2), None]
    selection = SELECTORS.create("energy_aware", {}).select(0.0, w.fleet(beats), w.request(1, 4))
    chosen = {choice.device: choice for choice in selection.choices}
    report = unpack(pack(Report(chosen=chosen, notes=selection.notes, unfit={"x": "offline"}, busy={"y": "trains"})))
    assert report.chosen == chosen
    assert (report.unfit, report.busy) == ({"x": "offline"}, {"y": "trains"})
    assert dict(report.notes) == dict(selection.notes)
    assert report.notes[w.name(1)].reason == "battery 3% after the job would be under 25%"
    assert report.notes[w.name(2)].reason == "its owner's limits forbid it now: metered"
    assert report.notes[w.name(1)].figures["charge_after"] == pytest.approx(0.03, abs=1e-3)


def test_plain_notes_of_other_selectors_are_kept():
    """Any text, braces and all; figures that only some devices have."""
    notes = {"a": Note("took {x}", {"x": 1.5}), "b": Note("no"), "c": Note("", {"y": float("nan"), "z": 1e300})}
    report = unpack(pack(Report(chosen={"a": Choice(device="a", deadline_s=1.0)}, notes=notes)))
    assert report.notes["a"] == Note("took {x}", {"x": 1.5})
    assert report.notes["b"] == Note("no", {})
    assert list(report.notes) == ["a", "b", "c"]
    assert set(report.notes["c"].figures) == {"z"}


def test_empty_reports():
    """Nothing noted is nothing read."""
    report = unpack(pack(Report()))
    assert (dict(report.notes), report.chosen, report.unfit, report.busy) == ({}, {}, {}, {})


@pytest.mark.parametrize("damage", [lambda data: data[:0], lambda data: data[:-3], lambda data: b"x" + data])
def test_damaged_reports_are_refused_by_name(damage):
    """One line says what cannot be read."""
    with pytest.raises(StoreError, match="report of a selection"):
        unpack(damage(pack(Report(unfit={"a": "offline"}))))


def test_later_marks_replace_earlier_ones():
    """The last word about a device counts; who was never marked has no note."""
    marks = Marks(["a", "b", "c"])
    marks.mark(np.array([True, True, False]), "first")
    marks.mark(np.array([1]), "second, {x:.1f}")
    marks.figure("x", np.array([2.0]), np.array([1]))
    assert dict(marks.table()) == {"a": Note("first", {}), "b": Note("second, 2.0", {"x": 2.0})}
    assert "c" not in marks.table()
