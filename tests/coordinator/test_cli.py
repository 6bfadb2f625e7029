"""The command line, on a run that was driven without a network."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from coordinator import cli
from coordinator import events as e
from coordinator.aggregation.making import make_model
from coordinator.evaluation import evaluate_blob
from coordinator.hints import hints
from coordinator.plan import Training
from coordinator.report import run_summary
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.store import Store
from coordinator.wording import size
from edge_runtime.bundle import Bundle
from edge_runtime.messages import BlobRef
from tests.coordinator import helpers as h
from tests.edge_runtime import toy_bundle

PLAN = """
name = "toy"
bundle = "toy.bundle"
dataset = "digits"
rounds = 2
retain_updates = "all"
test_set = "test.npz"
[uplink]
codec = "raw"
[downlink]
codec = "raw"
[participation]
target = 2
[training]
epochs = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a plan, and the state folder set in the environment."""
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    toy_bundle.write_data(tmp_path / "test.npz")
    (tmp_path / "plan.toml").write_text(PLAN)
    monkeypatch.setenv("EDGE_STATE", str(tmp_path / "state"))
    return tmp_path


def call(capsys, *arguments):
    """Exit code, standard output and error of a command."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def serve(folder, run, limit=100):
    """What the server does, with two devices that send random updates at once."""
    store, fleet = Store(folder / "state"), h.fleet("a", "b")
    store.save([device.row() for device in fleet.devices()])
    stored = store.run(run)
    bundle, state = (
        Bundle.open(store.blobs.path(stored.row.bundle.sha256)),
        RunState.from_rows(stored.plan, store.load_run(run)),
    )
    rng, todo = np.random.default_rng(1), [*resume(state), None]
    layout = bundle.layout()
    while todo and limit:
        limit -= 1
        match todo.pop(0):
            case None:
                todo += step(state, e.Tick(100.0), fleet)
            case e.Save(rows):
                store.save(rows)
            case e.SendJob(row):
                vector = rng.normal(size=layout.size).astype(np.float32)
                data = h.encoded(vector, layout, h.update_id(row), version=row.version)
                blob = BlobRef(sha256=store.blobs.put(data).sha256, size_bytes=len(data))
                todo += step(state, e.UpdateArrived(101.0, h.update_id(row), blob, h.meta(row, loss=1.0)), fleet)
            case e.Aggregate() as effect:
                made = make_model(store.blobs, stored.plan, effect, layout)
                done = e.Aggregated(102.0, effect.round, **made._asdict(), bytes_up=2000, bytes_down=3000)
                todo += step(state, done, fleet)
            case e.Evaluate(version, model):
                result = evaluate_blob(store.blobs, bundle, stored.row.test_set, model)
                todo += step(state, e.Evaluated(103.0, version, result), fleet)
    store.close()


@pytest.fixture
def finished(folder, capsys):
    """The folder after a finished run "toy-1"."""
    assert call(capsys, "submit", folder / "plan.toml")[0] == 0
    serve(folder, "toy-1")
    return folder


def test_submit_checks_and_stores(folder, capsys):
    """The name of the run is printed; bundle and test set are copied, so the originals may go."""
    code, out, _ = call(capsys, "submit", folder / "plan.toml", "--json")
    assert (code, json.loads(out)) == (0, {"run": "toy-1"})
    (folder / "toy.bundle").unlink()
    (folder / "test.npz").unlink()
    serve(folder, "toy-1")
    assert Store(folder / "state").run("toy-1").row.status == "finished"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('bundle = "toy.bundle"', 'bundle = "no.bundle"', "no.bundle: cannot be read"),
        ("rounds = 2", "rounds = 0", "rounds"),
        ('[uplink]\ncodec = "raw"', '[uplink]\ncodec = "zip"', "uplink: codec 'zip' is unknown"),
        ('[downlink]\ncodec = "raw"', '[downlink]\ncodec = "zip"', "downlink: codec 'zip' is unknown"),
        ('[uplink]\ncodec = "raw"', "[uplink]\noptions = {speed = 1}", "has no option 'speed'"),
        ('[uplink]\ncodec = "raw"', '[uplink]\ncodec = "raw"\ntarget_ratio = 9.0', "loses nothing"),
        ('[uplink]\ncodec = "raw"', '[uplink]\ncodec = "topk"\nby_samples = true', "need target_ratio or budget_bytes"),
        ('[uplink]\ncodec = "raw"', "[uplink]\ntarget_ratio = 9.0\nbudget_bytes = 900", "set one of target_ratio"),
        ('[downlink]\ncodec = "raw"', '[downlink]\ncodec = "topk"\noptions = {momentum = 0.9}', "no option 'momentum'"),
        ('[uplink]\ncodec = "raw"', "[uplink]\noptions = {max_norm = 2.0}", "set max_norm in [uplink] itself"),
        (
            '[uplink]\ncodec = "raw"',
            '[uplink]\ncodec = "int8"\ntarget_ratio = 3.0',
            "leave target_ratio out, or choose",
        ),
        ('[uplink]\ncodec = "raw"', "[uplink]\ntarget_ratio = inf", "uplink.target_ratio is inf; give a finite number"),
        ("epochs = 1", "epochs = 1\nhyper = {lr = nan}", "training.hyper.lr is nan; give a finite number"),
        ("rounds = 2", 'rounds = 2\ncodec = "zstd"', "codec"),
        ("rounds = 2", 'rounds = 2\nmethod = "magic"', "method 'magic' is unknown"),
        ("rounds = 2", 'rounds = 2\nserver_method = "magic"', "no server method is called 'magic'"),
        ("rounds = 2", "rounds = 2\nserver_options = {rate = 1.0}", "unknown rate"),
        ("rounds = 2", 'rounds = 2\nvariant = "last"', "no variant 'last'"),
        ("epochs = 1", "epochs = 1\nhyper = {rate = 1.0}", "'rate', bundle 'toy' knows lr, momentum"),
        ("target = 2", 'target = 2\nselector = "magic"', "no selector is called 'magic'"),
        ('test_set = "test.npz"', 'test_set = "plan.toml"', "plan.toml: test_set cannot be used: "),
        ('test_set = "test.npz"', 'test_set = "no.npz"', "no.npz is no file; correct test_set in the plan"),
    ],
)
def test_unusable_plans_are_refused_at_once(folder, capsys, old, new, reason):
    """Exit code 2, one line that names the mistake, and no run is stored."""
    (folder / "plan.toml").write_text(PLAN.replace(old, new))
    code, _, err = call(capsys, "submit", folder / "plan.toml")
    assert code == 2
    assert reason in err
    assert "agent" not in err
    assert err.count("\n") == 1
    assert any(str(folder / name) in err for name in ("plan.toml", "toy.bundle", "no.bundle"))
    assert "plan 'toy'" not in err
    assert Store(folder / "state").runs() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"target": 3, "concurrency": 3, "mode": "buffered"}, ""),
        ({"target": 50, "concurrency": 1, "mode": "buffered"}, "50 devices take turns for each, 1 at a time"),
        ({"target": 5, "concurrency": 2, "mode": "anarchic"}, "at most 2 updates, after a silence"),
        ({"training": Training(epochs=1, min_steps=5)}, "training.min_steps has no effect: selector 'random'"),
        ({"server_method": "afa_cd", "mode": "buffered"}, "'afa_cd' is made for mode 'anarchic'"),
        ({"server_method": "refl", "mode": "buffered"}, "'fedbuff' is made for it"),
    ],
)
def test_what_is_seldom_meant_is_hinted_at(changes, said):
    """A plan that can be run, but probably not as its user thinks."""
    told = hints(h.plan(**changes))
    assert len(told) == bool(said)
    assert said in "".join(told)


def test_hints_do_not_keep_a_plan_from_running(folder, capsys):
    """They are said beside the answer."""
    (folder / "plan.toml").write_text(PLAN.replace("epochs = 1", "epochs = 1\nmin_steps = 3"))
    code, out, err = call(capsys, "submit", folder / "plan.toml", "--json")
    assert (code, json.loads(out)) == (0, {"run": "toy-1"})
    assert err.startswith("hint: training.min_steps has no effect")


def test_status_tells_what_happened(finished, capsys):
    """For people: rounds, accuracy, bytes, devices. For machines: one JSON object with the summary in it."""
    code, out, _ = call(capsys, "status")
    assert code == 0
    assert "toy-1: finished, 2/2 rounds, accuracy" in out
    assert "4.0 kB up (" in out
    assert "6.0 kB down (" in out
    code, out, _ = call(capsys, "status", "toy-1", "--json")
    value = json.loads(out)
    summary = run_summary(Store(finished / "state"), "toy-1")
    assert {key: value[key] for key in summary if key != "seconds"} == {
        k: v for k, v in summary.items() if k != "seconds"
    }
    assert (summary["bytes_up"], summary["bytes_down"], summary["devices"]) == (4000, 6000, 2)
    assert summary["updates"] == {"counted": 4, "refused": 0, "pending": 0}
    assert 0 <= summary["accuracy"] <= summary["best_accuracy"] <= 1
    assert len(value["fleet"]) == 2


def test_rounds_in_which_the_coordinator_was_restarted_are_in_no_ratio(finished, capsys):
    """Their bytes are only a part, and everything that shows them says so."""
    store = Store(finished / "state")
    before = run_summary(store, "toy-1")
    assert before["bytes_complete"]
    first, second = store.rounds("toy-1")
    store.save([msgspec.structs.replace(first, bytes_up=3, bytes_down=4, bytes_complete=False)])
    summary = run_summary(store, "toy-1")
    assert summary["bytes_up"] == second.bytes_up + 3
    assert [entry["bytes_complete"] for entry in summary["history"]] == [False, True]
    assert [entry["ratio_up"] for entry in summary["history"]] == [None, summary["ratio_up"]]
    assert (summary["bytes_complete"], summary["ratio_down"]) == (False, summary["history"][1]["ratio_down"])
    out = call(capsys, "status")[1]
    assert f">{size(3)}" in out
    assert "> at least: the coordinator was restarted" in out
    store.save([msgspec.structs.replace(first, bytes_complete=True)])
    assert run_summary(store, "toy-1") == before
    store.save([msgspec.structs.replace(store.run("toy-1").row, bytes_complete=False)])
    assert not run_summary(store, "toy-1")["bytes_complete"]


def test_status_of_a_waiting_run_says_what_it_waits_for(folder, capsys):
    """How many devices fit, how many are wanted, and why one does not."""
    call(capsys, "submit", folder / "plan.toml")
    Store(folder / "state").save([device.row() for device in h.fleet("a").devices()])
    lost = h.device("b", codecs=[])
    fleet = h.fleet()
    fleet.announce(0.0, lost)
    Store(folder / "state").save([fleet.get("b").row()])
    Store(folder / "state").server_lives("coordinator", time.time())
    out = call(capsys, "status")[1]
    assert "round 1 waits for devices: 1 fit, 2 wanted" in out
    assert "lacks codec 'raw'" in out


def test_without_a_server_status_says_so(folder, capsys):
    """It claims neither that a run waits for devices nor that these are online."""
    call(capsys, "submit", folder / "plan.toml")
    store = Store(folder / "state")
    store.save([device.row() for device in h.fleet("a").devices()])
    for command in ("status", "devices"):
        out = call(capsys, command)[1]
        assert "no server is running on this state folder" in out
        assert "online" not in out
    assert json.loads(call(capsys, "status", "--json")[1])["server_running"] is False
    store.server_lives("coordinator", time.time())
    assert json.loads(call(capsys, "status", "--json")[1])["server_running"] is True
    for command in ("status", "devices"):
        out = call(capsys, command)[1]
        assert "no server" not in out
        assert "online" in out


@pytest.mark.usefixtures("finished")
def test_watch_prints_rounds_when_piped(capsys):
    """A line per round and the outcome at the end; with --json a value per round."""
    code, out, _ = call(capsys, "status", "toy-1", "--watch")
    lines = out.splitlines()
    assert code == 0
    assert [line.split(":")[0] for line in lines] == ["round 1", "round 2", "toy-1"]
    values = [json.loads(line) for line in call(capsys, "status", "toy-1", "--watch", "--json")[1].splitlines()]
    assert [value.get("round") for value in values] == [0, 1, None]
    assert values[-1]["status"] == "finished"


@pytest.mark.usefixtures("finished")
def test_watch_redraws_on_a_terminal(capsys, monkeypatch):
    """A terminal gets a page, with escape codes only to redraw it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = call(capsys, "status", "toy-1", "--watch")
    assert code == 0
    assert "toy-1: finished" in out
    assert "on devices" in out


def test_failed_runs_fail_the_watching_command(folder, capsys):
    """`submit --watch` in a script notices."""
    call(capsys, "submit", folder / "plan.toml")
    store = Store(folder / "state")
    stored = store.run("toy-1")
    stored.row.status, stored.row.reason, stored.row.phase = "failed", "no devices", "done"
    store.save([stored.row])
    code, out, _ = call(capsys, "status", "--watch")
    assert code == 1
    assert "failed (no devices)" in out


@pytest.mark.parametrize("version", [None, 0, 1])
def test_model_is_written(finished, capsys, version):
    """Any version, in a form that stock onnxruntime loads."""
    wanted = [] if version is None else ["--version", version]
    path = finished / "out.onnx"
    code, out, _ = call(capsys, "model", "toy-1", "-o", path, *wanted)
    assert code == 0
    assert f"version {2 if version is None else version} of toy-1" in out
    ort.InferenceSession(str(path))


def test_wrong_models_are_told(finished, capsys):
    """Version and format are checked first."""
    assert call(capsys, "model", "toy-1", "-o", finished / "x.onnx", "--version", 9)[0] == 2
    code, _, err = call(capsys, "model", "toy-1", "-o", finished / "x.pt")
    assert code == 2
    assert ".onnx, .safetensors" in err


def test_verify_builds_the_models_again(finished, capsys):
    """Bit for bit from the stored updates; a changed update is found out."""
    assert call(capsys, "verify", "toy-1") == (0, "toy-1: 2 of 2 versions made again bit for bit\n", "")
    store = Store(finished / "state")
    first, second = store.counted_updates("toy-1", 1)
    layout = Bundle.open(finished / "toy.bundle").layout()
    changed = h.encoded(np.ones(layout.size, np.float32), layout, first.update, version=1)
    store.blobs.path(first.blob.sha256).write_bytes(changed)
    code, out, _ = call(capsys, "verify", "toy-1", "--json")
    assert code == 1
    assert json.loads(out) == {"run": "toy-1", "versions": 2, "different": [2]}
    store.blobs.path(first.blob.sha256).write_bytes(store.blobs.path(second.blob.sha256).read_bytes())
    code, _, err = call(capsys, "verify", "toy-1")
    assert code == 1
    assert f"update {first.update}: the bytes are those of another update" in err


def test_stop_asks_the_server(folder, capsys):
    """The request stands in the database; a run that has ended is left alone."""
    call(capsys, "submit", folder / "plan.toml")
    assert call(capsys, "stop", "toy-1", "--reason", "enough")[0] == 0
    assert Store(folder / "state").active()[0].stop_reason == "enough"
    Store(folder / "state").server_lives("coordinator", time.time())
    assert "stopping" in call(capsys, "status")[1]
    serve(folder, "toy-1")
    assert "already ended" in call(capsys, "stop", "toy-1")[1]


@pytest.mark.usefixtures("finished")
def test_runs_and_devices_are_listed(capsys):
    """All runs, all devices, for people and for machines."""
    assert "toy-1  finished  2/2" in call(capsys, "runs")[1]
    assert [value["run"] for value in json.loads(call(capsys, "runs", "--json")[1])] == ["toy-1"]
    assert "digits (10)" in call(capsys, "devices")[1]
    assert [value["device"] for value in json.loads(call(capsys, "devices", "--json")[1])] == ["a", "b"]


@pytest.mark.parametrize("command", ["status", "model", "stop", "verify"])
def test_unknown_runs_have_their_exit_code(folder, capsys, command):
    """3, and the message lists the latest runs."""
    call(capsys, "submit", folder / "plan.toml")
    extra = ["-o", folder / "x.onnx"] if command == "model" else []
    code, _, err = call(capsys, command, "nothing", *extra)
    assert code == 3
    assert "the latest: toy-1" in err


@pytest.mark.parametrize("command", ["serve", "submit", "status", "runs", "devices", "model", "stop", "verify"])
def test_every_command_has_help_with_an_example(command, capsys):
    """And says what its exit codes mean."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"edge-coordinator {command}" in out.split("example:")[1]
    assert "3 no such run" in out


def test_wrong_usage_is_exit_code_2(capsys):
    """As argparse does, for every command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["dance"])
    assert ended.value.code == 2
    capsys.readouterr()


def test_help_is_fast_and_light():
    """No onnxruntime, SQLAlchemy or torch is imported to print help."""
    code = (
        "import sys; from coordinator import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'onnxruntime', 'sqlalchemy', 'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_test_set_with_nan_is_refused_at_submit(folder, capsys):
    """Not at the first evaluation, when devices have already worked."""
    with np.load(folder / "test.npz") as file:
        x, y = file["x"].astype(np.float32), file["y"]
    x[5] = np.nan
    np.savez(folder / "test.npz", x=x, y=y)
    code, _, err = call(capsys, "submit", folder / "plan.toml")
    assert code == 2
    assert "NaN" in err
    assert "sample 5" in err


def test_a_test_set_with_other_names_is_told_for_the_plan(folder, capsys):
    """The cure is one for the test set, not for a device's configuration."""
    np.savez(folder / "test.npz", inputs=np.zeros((4, 2), np.float32))
    code, _, err = call(capsys, "submit", folder / "plan.toml")
    assert code == 2
    assert "test_set cannot be used" in err
    assert "has no array 'x'; it has inputs; name the arrays x and y" in err


def test_a_model_that_was_cleaned_away_names_the_cure(finished, capsys):
    """Versions between the first and the latest are kept on request only."""
    store = Store(finished / "state")
    (first, _) = store.rounds("toy-1")
    store.blobs.delete(first.model.sha256)
    with sqlite3.connect(finished / "state" / "coordinator.db") as connection:
        connection.execute(
            'UPDATE runs SET plan = replace(plan, \'"retain_updates":"all"\', \'"retain_updates":"round"\')'
        )
    code, _, err = call(capsys, "model", "toy-1", "-o", finished / "x.onnx", "--version", 1)
    assert code == 1
    assert "version 1 of run 'toy-1' was not kept" in err
    assert 'retain_updates = "all"' in err


@pytest.mark.usefixtures("folder")
def test_a_base_install_names_the_extra():
    """One line with the command that installs what is missing, and exit code 2."""
    code = "import sys; sys.modules['sqlalchemy'] = None; from coordinator import cli; sys.exit(cli.main(['status']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2
    assert 'pip install "edge-training-runtime[coordinator]"' in done.stderr
    assert done.stderr.count("\n") == 1
