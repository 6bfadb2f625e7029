"""``edge-energy profile``: what it says of its progress, and what it refuses before it measures."""

from __future__ import annotations

import re

import pytest

from energy import cli
from energy.thor.profile import load_profile
from tests.energy.probe_packs import dense_pack

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 0.0002)


def command(*arguments):
    return cli.main(["profile", "--sensor", "none", *map(str, arguments)])


def progress(text):
    """Numbers of the progress lines: new, again, in all, seconds left."""
    found = re.findall(r"(\d+) points new, (\d+) measured again, (\d+) in all; (-?\d+) s left", text)
    return [tuple(map(int, row)) for row in found]


def test_progress_counts_new_points_and_those_measured_again(tmp_path, capsys):
    """After --resume the points of the earlier session are in the sum; seconds left are never below 0."""
    pack, output = dense_pack(tmp_path / "a.probes", candidates=2), tmp_path / "points.json"
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 20) == 0
    rows = progress(capsys.readouterr().err)
    assert rows[-1][0] == rows[-1][2] == 6
    assert rows[0][1] == 0
    assert rows[-1][1] == 2 * 6
    assert all(left >= 0 for *_, left in rows)
    # Another batch is another size, which a profile may have beside the first.
    assert command(pack, "-o", output, "--measure-only", "--budget-s", 20, "--resume", "--batch", 16) == 0
    rows = progress(capsys.readouterr().err)
    assert rows[-1][2] == rows[-1][0] + 6
    points = [point for family in load_profile(output).families for point in family.points]
    assert len(points) == rows[-1][2]
    assert {point.sizes["batch"] for point in points} == {16, 32}


def test_a_budget_that_no_fit_can_come_of_is_refused_at_once(tmp_path, capsys, monkeypatch):
    """The message names one that does; nothing was measured or written."""
    pytest.importorskip("scipy")
    monkeypatch.setattr("energy.thor.gauge.CpuGauge.window_s", 2.0)
    output = tmp_path / "profile.json"
    assert command(dense_pack(tmp_path / "a.probes"), "-o", output, "--budget-s", 5) == 2
    said = capsys.readouterr().err
    assert "too few for 4 points of each of 2 kinds" in said
    assert re.search(r"give --budget-s \d+ or more", said)
    assert "points new" not in said
    assert not output.exists()


def test_a_folder_that_is_not_there_is_said_before_measuring(tmp_path, capsys):
    """Not after the budget is spent."""
    output = tmp_path / "none" / "profile.json"
    assert command(dense_pack(tmp_path / "a.probes"), "-o", output, "--measure-only") == 2
    said = capsys.readouterr().err
    assert f"there is no folder {tmp_path / 'none'}" in said
    assert "points new" not in said
