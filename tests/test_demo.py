"""The demonstration does what the README says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("sqlalchemy")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_demo_learns_digits(tmp_path: Path) -> None:
    """Eight agents with uneven shares reach 90 % on digits that none of them holds, and the model is usable."""
    command = [sys.executable, "-m", "examples.demo", "--runs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["accuracy"] >= 0.90
    assert summary["devices"] == 8
    assert summary["rounds"] == 30
    assert min(summary[key] for key in ("bytes_up", "bytes_down", "seconds")) > 0
    assert "torch" not in (folder / "logs" / "device-00.log").read_text()
    _check_model(folder, summary["accuracy"])
    _check_energy(summary, result.stdout)


def _check_energy(summary: dict, text: str) -> None:
    """The ledger has every job, adds up to the run's and its rounds' joules, and the word stands beside the number."""
    energy, ledger = summary["energy"], summary["ledger"]
    counted = [row for row in ledger if row["status"] == "counted"]
    assert energy["measured_jobs"] + energy["modelled_jobs"] == len(ledger), "every job is known"
    assert energy["joules"] is None, "agents on one machine cannot measure their own shares of it"
    assert len(counted) == summary["updates"]["counted"] == sum(entry["updates"] for entry in summary["history"])
    for total, parts in (
        ("joules", ("train_joules", "compress_joules", "other_joules")),
        ("modelled_joules", ("train_modelled_joules", "compress_modelled_joules", "other_modelled_joules")),
    ):
        known = [row[part] for row in ledger for part in parts if row[part] is not None]
        rounds = [entry["energy"][total] for entry in summary["history"] if entry["energy"][total] is not None]
        assert energy[total] == (pytest.approx(sum(known)) if known else None)
        assert (energy[total] or 0) == pytest.approx(sum(rounds), abs=0.001)
        word = "measured" if total == "joules" else "modelled"
        assert (f"training, {word}" in text) == bool(known)
        assert (f"total, {word}" in text) == bool(known)
    assert "are of the CPU time that the agents added; the first round also loads the models" in text


def _check_model(folder: Path, accuracy: float) -> None:
    """The saved ONNX model alone gives the accuracy that the run reports, on the same preprocessed test digits."""
    import onnxruntime

    with np.load(folder / "test.npz") as file:
        x, y = file["x"].astype(np.float32) / 16, file["y"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    assert (logits.argmax(1) == y).mean() == pytest.approx(accuracy)
