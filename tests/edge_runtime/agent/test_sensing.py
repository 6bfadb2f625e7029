"""Which ways to measure a configuration comes to."""

from __future__ import annotations

import pytest

from edge_runtime.agent.energy_config import EnergyConfig, PlugConfig
from edge_runtime.agent.sensing import survey
from edge_runtime.errors import ConfigError
from energy.calibration import Calibration, save_calibration
from tests.energy import boards


def sensors(found):
    """Names of the sensors, way by way."""
    return [[sensor.source.sensor for sensor in way] for way in found.ways]


def machine(folder, board=None):
    """Files of a machine that tells its load."""
    if board is not None:
        board(folder)
    boards.write(folder / "proc/stat", "cpu  100 0 50 1000 0 0 0 0 0 0")
    return folder


def test_the_model_comes_after_what_measures(tmp_path):
    """Best first, the model last, and only where there are watts for it."""
    root = machine(tmp_path, boards.agx_orin)
    watts = {"idle_watts": 8.0, "busy_watts": 30.0}
    assert sensors(survey(EnergyConfig(), root=root)) == [["jetson"]]
    assert sensors(survey(EnergyConfig(**watts), root=root)) == [["jetson"], ["modelled"]]
    assert sensors(survey(EnergyConfig(sensor="modelled", **watts), root=root)) == [["modelled"]]
    assert sensors(survey(EnergyConfig(sensor="none", **watts), root=root)) == []


def test_a_calibration_brings_its_watts(tmp_path):
    """The model says what it was fitted to; a file that cannot be read is an error that names it."""
    root = machine(tmp_path / "root")
    save_calibration(Calibration(2.5, 7.5, 4, 0.1, "plug", "board", "all"), tmp_path / "modelled.json")
    found = survey(EnergyConfig(calibration=str(tmp_path / "modelled.json")), root=root)
    assert found.ways[0][0].source.covers.endswith("2.5 W idle to 7.5 W busy, by CPU load, fitted to plug (board)")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        survey(EnergyConfig(calibration=str(tmp_path / "none.json")), root=root)


def test_a_plug_that_is_not_there_is_refused_with_the_reason(tmp_path):
    """The agent does not wait for it to start, and the model stands in."""
    plug = PlugConfig(url="mqtt://localhost:1", kind="tasmota", topic="desk")
    config = EnergyConfig(plug=plug, idle_watts=1.0, busy_watts=2.0)
    found = survey(config, root=machine(tmp_path))
    assert sensors(found) == [["modelled"]]
    (reason,) = [refusal.reason for refusal in found.refused if refusal.sensor == "plug"]
    assert "mqtt://localhost:1" in reason
