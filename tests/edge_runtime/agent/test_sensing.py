"""Which ways to measure a configuration comes to."""

from __future__ import annotations

import os

import pytest

from edge_runtime.agent.energy_config import EnergyConfig, PlugConfig
from edge_runtime.agent.sensing import survey
from edge_runtime.errors import ConfigError
from energy.metering.calibration import Calibration, save_calibration
from energy.metering.meter import Meter
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


def test_a_model_of_the_agent_alone_has_no_idle_power(tmp_path):
    """Several agents on a machine would each count it; what a core adds is the same as in a model of the machine."""
    config = EnergyConfig(sensor="modelled", idle_watts=3.0, busy_watts=11.0)
    used = [0.0]
    found = survey(config, busy_s=lambda: used[0], root=machine(tmp_path))
    sensor = found.ways[0][0]
    cores = os.cpu_count() or 1
    (before,) = sensor.read()
    used[0] = 2.0
    (after,) = sensor.read()
    assert after - before == pytest.approx(2.0 * 8.0 / cores)
    assert found.core_watts == pytest.approx(8.0 / cores)
    assert sensor.source.covers.startswith("nothing measured: ")
    assert "without the idle power of the machine" in sensor.source.covers
    assert survey(config, root=machine(tmp_path)).core_watts is None


def test_an_agent_takes_a_plug_that_is_not_there_yet(tmp_path):
    """Its broker may come later: nothing waits for it, the meter tries it, and the model stands in meanwhile."""
    plug = PlugConfig(url="mqtt://localhost:1", kind="tasmota", topic="desk")
    config = EnergyConfig(plug=plug, idle_watts=1.0, busy_watts=2.0)
    found = survey(config, root=machine(tmp_path), background=True)
    assert sensors(found) == [["plug"], ["modelled"]]
    assert found.measuring == {"plug"}
    told = []
    meter = Meter(found.ways, on_change=told.append)
    assert meter.source.quality == "modelled"
    assert "goes on with modelled" in told[0]
    meter.close()


def test_a_plug_that_is_not_there_is_refused_with_the_reason(tmp_path):
    """Who checks a configuration waits for the answer, and the model stands in."""
    plug = PlugConfig(url="mqtt://localhost:1", kind="tasmota", topic="desk")
    config = EnergyConfig(plug=plug, idle_watts=1.0, busy_watts=2.0)
    found = survey(config, root=machine(tmp_path))
    assert sensors(found) == [["modelled"]]
    (reason,) = [refusal.reason for refusal in found.refused if refusal.sensor == "plug"]
    assert "mqtt://localhost:1" in reason
