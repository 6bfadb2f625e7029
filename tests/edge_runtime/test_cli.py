"""``edge-agent`` from its command line."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from edge_runtime.cli import main
from edge_runtime.store.spool import Spool
from tests.edge_runtime import toy_bundle

AGENT = """device = "pi"
state_dir = "state"
[broker]
url = "mqtt://localhost:1883"
[[data]]
name = "d"
path = "d.npz"
"""
BUNDLES = ("ab" * 32, "cd" * 32)


@pytest.fixture
def agent(tmp_path):
    """A folder with agent.toml, data and a bundle."""
    (tmp_path / "agent.toml").write_text(AGENT)
    toy_bundle.write_data(tmp_path / "d.npz", 10)
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    return tmp_path


def run(folder, capsys, command, *options):
    """Exit code, standard output and standard error of a command."""
    code = main([command, "--config", str(folder / "agent.toml"), *options])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_check_compares_data_with_a_bundle(agent, capsys):
    """Data that fits is said to fit."""
    code, out, _ = run(agent, capsys, "check", "--bundle", str(agent / "toy.bundle"))
    assert (code, out.splitlines()[-1]) == (0, "dataset d: 10 samples, all fit toy")
    code, out, _ = run(agent, capsys, "check", "--bundle", str(agent / "toy.bundle"), "--dataset", "d", "--json")
    assert json.loads(out)["bundle"] == "toy"


def test_check_says_what_joules_would_come_from(agent, capsys):
    """The sensor in use or what stands in for it, refusals with their reason, the radio, limits that cannot hold."""
    (agent / "agent.toml").write_text(
        AGENT + '[energy]\nsensor = "modelled"\nidle_watts = 2\nbusy_watts = 5\nradio = "lte"'
    )
    code, out, _ = run(agent, capsys, "check")
    assert code == 0
    assert "energy: modelled: nothing measured: 2 W idle to 5 W busy" in out
    assert "energy: radio: 5.27 J per MB up, 2.18 down, modelled (LTE of a phone" in out
    said = json.loads(run(agent, capsys, "check", "--json")[1])["energy"]
    assert (said["source"]["modelled"], said["refused"]) == (True, [])
    (agent / "agent.toml").write_text(AGENT + '[energy]\nsensor = "none"')
    assert "energy: joules are unknown: switched off" in run(agent, capsys, "check")[1]
    (agent / "agent.toml").write_text(AGENT + '[energy]\nsensor = "jetsom"')
    code, _, error = run(agent, capsys, "check")
    assert (code, "no sensor is called 'jetsom'; did you mean 'jetson'" in error) == (2, True)
    (agent / "agent.toml").write_text(AGENT + '[energy]\nsensor = "thor"\n[limits]\njob_joules = 5')
    out = run(agent, capsys, "check")[1]
    if "energy: joules are unknown" in out:  # on any machine but a Jetson Thor
        assert "energy: limits.job_joules will not hold: nothing here can measure" in out
        assert "energy: refused: thor: " in out


def test_check_says_which_limits_are_in_force(agent, capsys):
    """As agent.toml has them; none is said too."""
    assert "limits: none" in run(agent, capsys, "check")[1]
    limits = '[limits]\nonly_when_charging = true\nhours = "22:00-06:00"\nbattery_reserve_percent = 30\n'
    (agent / "agent.toml").write_text(AGENT + limits)
    said = ["only_when_charging = true", 'hours = "22:00-06:00"', "battery_reserve_percent = 30"]
    assert "limits: " + ", ".join(said) in run(agent, capsys, "check")[1]
    assert json.loads(run(agent, capsys, "check", "--json")[1])["limits"] == said


def test_check_warns_of_limits_whose_fact_is_unknown(agent, capsys):
    """With the cure; what agent.toml or the telemetry file says is known, and so is the interface to the broker."""
    gauges, limits = agent / "gauges.json", "[limits]\nonly_when_charging = true\nonly_unmetered = true\n"
    gauges.write_text("{}")
    told = '[telemetry]\nfile = "gauges.json"\n'
    link = "[link]\nmetered = false\n"
    nowhere = AGENT.replace("mqtt://localhost:1883", "mqtts://no-such-host.invalid:8883")
    (agent / "agent.toml").write_text(nowhere + limits + told)
    code, out, _ = run(agent, capsys, "check")
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    unmetered = "warning: limits.only_unmetered declines every job: nothing here says whether the link is metered; set"
    assert (code, unmetered in warnings[-1]) == (0, True)
    said = json.loads(run(agent, capsys, "check", "--json")[1])["warnings"]
    assert [f"warning: {line}" for line in said] == warnings
    gauges.write_text('{"on_external_power": false}')
    (agent / "agent.toml").write_text(nowhere + limits + told + link)
    assert "warning" not in run(agent, capsys, "check")[1]
    (agent / "agent.toml").write_text(AGENT + limits + told)  # over the loopback nothing is metered
    assert "warning" not in run(agent, capsys, "check")[1]


def test_check_knows_the_telemetry_file(agent, capsys):
    """Joules of the day that it makes known hold; a cure names the file that is there already."""
    gauges = agent / "gauges.json"
    gauges.write_text('{"step_joules": 0.5}')
    limits = "[limits]\njoules_per_day = 5\nmax_temperature_c = 70\nbattery_reserve_percent = 20\n"
    told = '[telemetry]\nfile = "gauges.json"\n[energy]\nsensor = "thor"\n'
    (agent / "agent.toml").write_text(AGENT + limits + told)
    out = run(agent, capsys, "check")[1]
    assert "limits.joules_per_day will not hold" not in out
    assert f"energy: limits.joules_per_day goes by step_joules, as {gauges} says it" in out
    gauges.write_text("{")
    out = run(agent, capsys, "check")[1]
    assert "goes by step_joules" not in out
    assert "let a script of yours" not in out
    if "limits.battery_reserve_percent does not hold" in out:  # on a machine without a battery
        assert f"{gauges}, which [telemetry] file names, does not say battery_percent either" in out


def test_check_refuses_a_state_folder_that_run_would_refuse(agent, capsys):
    """A file in its place, or a spool of newer software; a folder that is not there yet is no fault, and not made."""
    assert run(agent, capsys, "check")[0] == 0
    assert not (agent / "state").exists()
    (agent / "state").write_text("")
    code, _, error = run(agent, capsys, "check")
    assert (code, "state cannot be used: " in error) == (2, True)
    (agent / "state").unlink()
    (agent / "state").mkdir()
    Spool(agent / "state").close()
    assert run(agent, capsys, "check")[0] == 0
    with sqlite3.connect(agent / "state" / "spool.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    code, _, error = run(agent, capsys, "check")
    assert (code, "99" in error) == (1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x[:, :3], y), "samples of shape (3,), the bundle expects (4,)"),
        (lambda x, y: (x, y.astype(float)), "y has type float64"),
        (lambda x, y: (x, y + 7), "is out of range"),
        (lambda x, y: (np.where(np.arange(10)[:, None] == 9, np.nan, x), y), "of sample 9 is NaN"),
    ],
)
def test_check_refuses_data_that_does_not_fit(agent, capsys, change, said):
    """Shape, type, labels and NaN: one line and exit code 2."""
    with np.load(agent / "d.npz") as file:
        x, y = change(file["x"], file["y"])
    np.savez(agent / "d.npz", x=x, y=y)
    code, _, error = run(agent, capsys, "check", "--bundle", str(agent / "toy.bundle"))
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1


def test_check_refuses_missing_data_bundles_and_datasets(agent, capsys):
    """Whatever is not there is named, with exit code 2."""
    assert "has no dataset 'e'; it has d" in run(agent, capsys, "check", "--dataset", "e")[2]
    assert "none.bundle does not exist" in run(agent, capsys, "check", "--bundle", str(agent / "none.bundle"))[2]
    code, _, error = run(agent, capsys, "check", "--bundle", str(agent / "d.npz"))
    assert (code, "d.npz" in error) == (2, True)
    (agent / "d.npz").unlink()
    code, _, error = run(agent, capsys, "check")
    assert (code, "does not exist; correct the path" in error) == (2, True)


def test_quarantine_is_listed_and_lifted(agent, capsys):
    """Bundles over the limit of crashes are listed; one or all are lifted, also while the agent has its spool open."""
    assert run(agent, capsys, "quarantine")[:2] == (0, "no bundle is in quarantine\n")
    (agent / "state").mkdir()
    spool = Spool(agent / "state")
    for bundle, crashes in ((BUNDLES[0], 3), (BUNDLES[1], 4), ("ef" * 32, 2)):
        for _ in range(crashes):
            spool.crashed(bundle)
    (spool.folder / "being-written.update").write_bytes(b"x")
    out = run(agent, capsys, "quarantine")[1]
    assert out.splitlines() == [
        f"bundle {BUNDLES[0]} crashed the worker 3 times",
        f"bundle {BUNDLES[1]} crashed the worker 4 times",
    ]
    code, _, error = run(agent, capsys, "quarantine", "--lift", "abcd")
    assert (code, "names no bundle in quarantine" in error) == (2, True)
    out = run(agent, capsys, "quarantine", "--lift", BUNDLES[0][:12], "--json")[1]
    assert json.loads(out) == {"quarantined": [{"bundle": BUNDLES[1], "crashes": 4}], "lifted": [BUNDLES[0]]}
    assert spool.crashes(BUNDLES[0]) == 0
    assert run(agent, capsys, "quarantine", "--lift", "all")[0] == 0
    assert (spool.crashes(BUNDLES[1]), spool.crashes("ef" * 32)) == (0, 2)
    assert (spool.folder / "being-written.update").exists()
    spool.close()
