"""``edge-energy`` as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from energy.commands.runs import Run, left_out, mean_and_half_width, means
from energy.metering.calibration import Calibration, save_calibration
from energy.metering.measurement import Measurement
from energy.sensors.base import Source

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "energy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60, **options)


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    """A tree with the counter of one package, which the test moves."""
    zone = tmp_path / "root/sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    (zone / "energy_uj").write_text("1000000\n")
    return tmp_path / "root"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A calibration."""
    save_calibration(Calibration(3.0, 7.0, 2, 0.1, "rapl", "package", "CPU"), tmp_path / "modelled.json")
    return tmp_path / "modelled.json"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A machine without any sensor."""
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


def test_sensors_are_listed_with_what_they_cover(rapl: Path) -> None:
    """A sensor that answers is shown with scope, rails and one reading, as text and as JSON."""
    text = call("sensors", "--root", rapl)
    assert text.returncode == 0, text.stderr
    assert "rapl: counter of the package" in text.stdout
    found = json.loads(call("sensors", "--root", rapl, "--json").stdout)
    assert found["sensors"][0]["rails"] == [
        {"name": "package-0", "scope": "package", "in_total": True, "joules": pytest.approx(1.0)}
    ]


def test_machine_without_sensors_says_so(empty: Path) -> None:
    """Nothing to read is exit code 1 and a sentence with the cure; --all names what was looked for."""
    result = call("sensors", "--root", empty)
    assert result.returncode == 1
    assert "no sensor of power or energy can be read here" in result.stdout
    assert "(absent)" not in result.stdout
    assert "jetson" in call("sensors", "--root", empty, "--all").stdout
    assert call("watch", "--root", empty).returncode == 1
    calibrated = call("calibrate", "--root", empty, "-o", empty / "x.json")
    assert calibrated.returncode == 2
    assert "needs a sensor that measures" in calibrated.stderr


def test_unknown_sensor_and_command_are_refused(rapl: Path) -> None:
    """A name that is not there is answered with those that are."""
    wrong = call("measure", "--root", rapl, "--sensor", "jetson", "--", "true")
    assert wrong.returncode == 2
    assert "rapl" in wrong.stderr
    assert "sensors, watch, measure, calibrate" in call("mesure").stderr
    assert call("measure").returncode == 2
    assert call("measure", "--root", rapl, "--", "/no/such/program").returncode == 2


def test_measure_without_a_sensor_times_the_command_and_passes_its_exit_code(empty: Path) -> None:
    """The command runs, its output and exit code are its own, and no joules are invented."""
    result = call("measure", "--root", empty, "--json", "--", "sh", "-c", "echo hello; exit 7")
    assert result.returncode == 7
    first, _, rest = result.stdout.partition("\n")
    assert first == "hello"
    report = json.loads(rest)
    assert report["source"] is None
    assert report["runs"][0]["joules"] is None
    assert report["runs"][0]["modelled_joules"] is None
    assert report["runs"][0]["seconds"] > 0
    assert "no sensor" in result.stderr


def test_measure_reads_gross_and_net(rapl: Path) -> None:
    """A command that moves the counter by 5 J drew 5 J, above an idle stretch that drew less."""
    code = "import sys,time; time.sleep(.3); open(sys.argv[1],'r+').write('6000000')"
    counter = rapl / "sys/class/powercap/intel-rapl:0/energy_uj"
    command = ("--", sys.executable, "-c", code, counter)
    result = call("measure", "--root", rapl, "--idle", "0.2", "-o", rapl / "drew.json", *command)
    report = json.loads((rapl / "drew.json").read_text())
    assert result.returncode == 0
    run = report["runs"][0]
    assert run["joules"] == pytest.approx(5.0, abs=0.3)
    assert run["modelled_joules"] is None
    assert run["rails_joules"] == {"package-0": run["joules"]}
    assert report["source"]["sensor"] == "rapl"
    assert "gross" in result.stderr


def test_modelled_figures_are_labelled_everywhere(model: Path) -> None:
    """Keys and text of a modelled measurement never say plain joules or watts."""
    result = call(
        "measure", "--root", "/", "--sensor", "modelled", "--model", model, "--idle", "2", "--json", "--", "true"
    )
    run = json.loads(result.stdout)["runs"][0]
    assert run["modelled_joules"] > 0
    assert run["idle_modelled_watts"] >= 3.0
    assert {run[key] for key in ("joules", "net_joules", "watts", "idle_watts", "joules_half_width")} == {None}
    text = call(
        "measure", "--sensor", "modelled", "--model", model, "--idle", "0.1", "--repeat", "2", "--", "true"
    ).stderr
    assert "NOT MEASURED" in text
    assert "modelled (modelled" not in text
    assert "--idle 0.1 is too short for modelled" in text
    assert all("modelled" in line for line in text.splitlines() if " J" in line or " W" in line)


def test_watts_may_be_given_in_place_of_a_calibration(empty: Path, model: Path) -> None:
    """They are modelled and called nominal; with --model, or one alone, they are refused."""
    (empty / "proc").mkdir()
    (empty / "proc/stat").symlink_to("/proc/stat")
    watts = ("--idle-watts", "2", "--busy-watts", "6")
    result = call("measure", "--root", empty, *watts, "--idle", "0", "--json", "--", "true")
    found = json.loads(result.stdout)
    assert (found["source"]["quality"], found["mean"]["joules"]) == ("modelled", None)
    assert found["mean"]["modelled_joules"] > 0
    assert "2 W idle to 6 W busy, by CPU load, nominal" in found["source"]["covers"]
    assert "--model brings its own watts" in call("watch", "--root", empty, *watts, "--model", model).stderr
    assert "belong together" in call("watch", "--root", empty, "--idle-watts", "2").stderr
    assert "0 <= idle < busy" in call("watch", "--root", empty, "--idle-watts", "6", "--busy-watts", "2").stderr


def test_a_damaged_calibration_names_what_it_lacks(model: Path) -> None:
    """The missing key, and the cure."""
    raw = json.loads(model.read_text())
    del raw["busy_watts"]
    model.write_text(json.dumps(raw))
    assert "lacks the key 'busy_watts'; calibrate again" in call("measure", "--model", model, "--", "true").stderr


def test_a_plug_that_cannot_be_reached_says_why(empty: Path, model: Path) -> None:
    """Every command does, also where a model stands in for the plug."""
    plug = ("--root", empty, "--plug", "tasmota:desk", "--broker", "mqtt://127.0.0.1:1")
    reason = "plug: broker mqtt://127.0.0.1:1"
    assert reason in call("sensors", *plug).stdout
    assert reason in call("watch", *plug).stderr
    (empty / "proc").mkdir()
    (empty / "proc/stat").symlink_to("/proc/stat")
    result = call("measure", *plug, "--model", model, "--idle", "0", "--", "true")
    assert reason in result.stderr
    assert "J modelled" in result.stderr


def test_the_object_goes_to_the_file_alone(empty: Path, tmp_path: Path) -> None:
    """With -o nothing of it is on standard output; the command is shown as a shell would take it."""
    out = tmp_path / "drew.json"
    result = call("measure", "--root", empty, "--json", "-o", out, "--", "echo", "a b")
    assert result.stdout == "a b\n"
    assert " echo 'a b':" in result.stderr
    run = json.loads(out.read_text())
    assert run["command"] == ["echo", "a b"]
    assert "joules_half_width" in run["runs"][0].keys() & run["mean"].keys()


def test_watch_prints_json_lines_in_a_pipe(model: Path) -> None:
    """One object per interval, ended by --count."""
    result = call("watch", "--sensor", "modelled", "--model", model, "--interval", "0.2", "--count", "2")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["joules"] for line in lines] == [None, None]
    assert all(line["modelled_watts"] >= 3.0 for line in lines)
    assert result.returncode == 0


def test_interrupt_ends_the_command_and_still_tells_what_it_drew(model: Path) -> None:
    """^C reaches the command; its figures up to then are printed, and the exit code says it was a signal."""
    arguments = ["measure", "--sensor", "modelled", "--model", str(model), "--idle", "0", "--json", "--"]
    child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(30)"]
    with subprocess.Popen(
        [sys.executable, "-m", "energy.cli", *arguments, *child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.killpg(process.pid, signal.SIGINT)
        text = process.stdout.read()
    assert json.loads(text)["runs"][0]["modelled_joules"] > 0
    assert process.returncode in (1, 130)


def test_interval_over_runs_is_students() -> None:
    """Three runs of 1, 2 and 3 J: mean 2, half-width 4.30 x 1 / sqrt(3)."""
    assert mean_and_half_width([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.483), abs=1e-3)
    assert mean_and_half_width([5.0]) == (5.0, None)


def one_run(joules: float, idle: float, problems: tuple[str, ...] = ()) -> Run:
    source = Source("rapl", "package", "counter", "CPU")
    rails = {"package-0": joules - 1.0, "dram": 1.0}
    return Run(Measurement("run", 0.0, 2.0, joules, 0.1, idle, source, rails, 20, 0.1, problems), 1.5, 0)


def test_runs_with_problems_are_left_out_of_the_means() -> None:
    """Joules, idle watts and rails are means of the good runs alone, and it is said how many are not in them."""
    runs = [one_run(10.0, 1.0), one_run(14.0, 3.0), one_run(99.0, 2.5, ("throttled: too hot",))]
    found = means(runs)
    assert found["joules"] == pytest.approx(12.0)
    assert found["idle_watts"] == pytest.approx(2.0)
    assert found["net_joules"] == pytest.approx(8.0)
    assert found["rails_joules"] == {"package-0": pytest.approx(11.0), "dram": pytest.approx(1.0)}
    assert left_out(runs) == "1 of 3 runs have problems and are left out of the means"
    assert left_out(runs[:2]) == left_out(runs[2:]) == ""


def test_all_runs_count_if_every_one_has_problems() -> None:
    """Doubtful means are better than none, if that is said."""
    runs = [one_run(10.0, 1.0, ("a gap",)), one_run(20.0, 1.0, ("throttled",))]
    assert means(runs)["joules"] == pytest.approx(15.0)
    assert left_out(runs).startswith("all 2 runs have problems")


def test_repeated_runs_are_reported_as_means(rapl: Path) -> None:
    """Text and JSON agree; a run whose counter stood still is named and left out."""
    code = (
        "import sys,time; time.sleep(.25); path,log=sys.argv[1:]; n=open(log,'a').write('x') and len(open(log).read());"
        "value=int(open(path).read()); open(path,'r+').write(str(value+(n!=2)*4000000))"
    )
    counter, log = rapl / "sys/class/powercap/intel-rapl:0/energy_uj", rapl / "runs"
    command = ("--idle", "0", "--repeat", "3", "-o", rapl / "drew.json", "--", sys.executable, "-c", code, counter, log)
    result = call("measure", "--root", rapl, *command)
    report = json.loads((rapl / "drew.json").read_text())
    assert [run["joules"] is None for run in report["runs"]] == [False, True, False]
    assert (report["counted_runs"], report["left_out_runs"]) == (2, 1)
    assert report["mean"]["joules"] == pytest.approx(4.0, abs=0.3)
    assert report["mean"]["rails_joules"]["package-0"] == report["mean"]["joules"]
    assert "note: 1 of 3 runs have problems and are left out" in result.stderr


def test_help_lists_every_command_with_a_summary() -> None:
    """Commands of other packages too, and without marks of the source's markup."""
    found = call("--help")
    assert found.returncode == 0
    assert "``" not in found.stdout
    rows = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line.startswith("  ")]
    summaries = {row[0]: row[1] for row in rows if len(row) > 1}
    assert "a training step" in summaries["predict"]
    if "prune" in summaries:  # the package may not be installed
        assert "remove channels" in summaries["prune"]
