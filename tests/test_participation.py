"""Runs without rounds with real agents: they end, models are made again bit for bit, and nothing is left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("onnx")

from coordinator.cli import main as coordinator_cli
from coordinator.report import run_summary
from edge_runtime.agent import standing
from tests.edge_runtime import toy_bundle
from tests.support.federation import Federation
from tests.test_federation import plan, toy_data

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.mosquitto]

METHODS = [("buffered", "fedbuff"), ("anarchic", "afa_cd"), ("anarchic", "afa_cs")]


@pytest.mark.parametrize(("mode", "method"), METHODS)
def test_a_run_without_rounds_comes_to_its_end(
    mode: str, method: str, tmp_path: Path, mosquitto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update counts once, and verify makes each model again from the retained updates."""
    monkeypatch.setattr(standing, "FIRST_S", 0.2)
    toy = toy_bundle.write_bundle(tmp_path / "toy.bundle")
    fed = Federation(tmp_path / "fed", mosquitto)
    try:
        for seed, device in enumerate(("pi-a", "pi-b", "pi-c")):
            fed.agent(device, toy_data(40 + seed, seed))
        rules = {"mode": mode, "target": 2, "minimum": 1, "deadline_s": 20.0, "max_staleness": 9}
        run = fed.submit(
            **plan(toy, rounds=4, participation=rules, training={"steps": 6, "min_steps": 2, "batch_size": 8}),
            server_method=method,
        )
        fed.finish(run)
        summary = run_summary(fed.store, run)
        assert summary["mode"] == mode
        assert summary["rounds"] == 4
        assert summary["updates"]["counted"] == sum(entry["updates"] for entry in summary["history"]) >= 8
        folder = str(fed.folder / "coordinator")
        assert coordinator_cli(["verify", run, "--state", folder]) == 0
        assert coordinator_cli(["explain", run, "1", "--state", folder]) == 0
        counted = [row for round_ in range(4) for row in fed.store.counted_updates(run, round_)]
        assert len({row.update for row in counted}) == len(counted)
        if mode == "anarchic":
            assert max(row.update.sequence for row in counted) >= 1
            assert all(2 <= row.meta.steps <= 6 for row in counted)
    finally:
        fed.close()


def test_rows_of_a_table_are_kept_as_long_as_they_are_needed(
    tmp_path: Path, mosquitto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One per device while the run goes on, whatever was replaced; none after its end."""
    monkeypatch.setattr(standing, "FIRST_S", 0.2)
    toy = toy_bundle.write_bundle(tmp_path / "toy.bundle")
    fed = Federation(tmp_path / "fed", mosquitto)
    try:
        for seed, device in enumerate(("pi-a", "pi-b")):
            fed.agent(device, toy_data(40, seed))
        rules = {"mode": "anarchic", "target": 2, "deadline_s": 20.0}
        settled = {"participation": rules, "training": {"steps": 3, "batch_size": 8}, "retain_updates": "round"}
        run = fed.submit(**plan(toy, rounds=40, **settled), server_method="afa_cs")
        seen: set[str] = set()

        def rows() -> set[str]:
            state = fed.coordinator.shell.runs.get(run)
            return set() if state is None else {row.blob.sha256 for row in state.table.values()}

        def grown() -> bool:
            seen.update(rows())
            return len(seen) >= 6

        fed.until(grown, "rows to be replaced")
        there = {name for name in seen if fed.store.blobs.has(name)}
        assert there == rows()
        assert len(there) == 2
        assert coordinator_cli(["stop", run, "--state", str(fed.folder / "coordinator")]) == 0
        fed.until(lambda: fed.row(run).status == "stopped", "the end")
        assert not [name for name in seen if fed.store.blobs.has(name)]
    finally:
        fed.close()
