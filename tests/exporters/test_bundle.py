"""The written file: deterministic, readable by the device; the example bundle; the command line; lazy imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_runtime.bundle import Bundle
from edge_runtime.errors import EdgeError
from examples import digits
from exporters import ExportError, cli, export_bundle
from tests.exporters.runner import Device

ROOT = Path(__file__).parents[2]


def dense():
    """Built by the command line tests."""
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def dense_with_input():
    return dense(), torch.zeros(5, 4)


def dense_arguments():
    return {"module": dense(), "example_input": torch.zeros(5, 4), "name": "named", "hyper": {"lr": 0.5}}


def not_a_model():
    return 3


def refused():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), torch.zeros(5, 4)


def test_two_exports_have_the_same_bytes(tmp_path):
    """Nothing in the file depends on time, order or chance."""
    one, two = tmp_path / "one.bundle", tmp_path / "two.bundle"
    for path in (one, two):
        export_bundle(path=path, parity=False, **dense_arguments())
    assert one.read_bytes() == two.read_bytes()


def test_files_are_stored_and_listed(tmp_path):
    """A zip of stored entries with fixed times: the manifest first, every file with its hash."""
    path = tmp_path / "model.bundle"
    report = export_bundle(path=path, parity=False, **dense_arguments())
    assert report.size_bytes == path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    assert entries[0].filename == "manifest.json"
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    bundle = Bundle.open(path)
    assert {entry.filename for entry in entries} == {"manifest.json", *bundle.manifest.files}
    for name in bundle.manifest.files:
        bundle.read(name)


def test_a_refused_export_leaves_nothing(tmp_path):
    """No bundle and no temporary file."""
    module, example = refused()
    with pytest.raises(ExportError):
        export_bundle(module, example, tmp_path / "model.bundle", name="model")
    assert not list(tmp_path.iterdir())


def test_the_gate_notices_a_wrong_graph(monkeypatch, tmp_path):
    """A weight gradient off by a thousandth is refused by name, with the size of the difference."""
    from exporters import _decompositions

    right = _decompositions.weight_gradient
    monkeypatch.setattr(_decompositions, "weight_gradient", lambda *args: right(*args) * 1.001)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ExportError, match=r"parity: gradients differ from torch, worst g\.0\.weight in .* by \d"):
        export_bundle(module, torch.randn(4, 1, 4, 4), tmp_path / "model.bundle", name="model", batch="dynamic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is not known; choose one of cross_entropy"),
        ({"optimizer": "lion"}, "optimizer 'lion' is not known; choose one of sgd"),
        ({"hyper": {"beta1": 0.9}}, "sgd has no hyper-parameter 'beta1'; it has lr"),
        ({"hyper": {"lr": float("nan")}}, "hyper-parameter lr is nan"),
        ({"hyper": {"clip_norm": float("inf")}}, "clip_norm is inf"),
        ({"batch": 0}, "batch is 0"),
        ({"labels": ["a"]}, "1 labels for 3 classes"),
        ({"trainable": ["head."]}, "no parameter starts with 'head.'; the model has bias, weight"),
        ({"trainable": lambda _name: False}, "no parameter is trainable"),
        ({"preprocessing": [{"factor": 2}]}, "it has scale, mean and std"),
        ({"example_input": [1.0]}, "must be one tensor or NumPy array"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    """Each message says what was given and what is possible."""
    with pytest.raises(ExportError, match=message.replace("(", r"\(")):
        export_bundle(**{**dense_arguments(), "path": tmp_path / "x.bundle", "parity": False, **options})


# The example --------------------------------------------------------------------------------------------------


def test_example_bundle_is_what_the_exporter_makes(tmp_path):
    """Rebuilt, it has the same manifest and parameters, computes the same, and with equal versions is equal."""
    kept = ROOT / "examples" / "digits.bundle"
    export_bundle(path=tmp_path / "digits.bundle", **digits.build())
    old, new = Device(kept), Device(tmp_path / "digits.bundle")
    if old.manifest.created_by == new.manifest.created_by:
        assert kept.read_bytes() == (tmp_path / "digits.bundle").read_bytes()
    for field in ("task", "inputs", "target", "batch", "parameters", "optimizer", "layers", "graphs"):
        assert getattr(old.manifest, field) == getattr(new.manifest, field), field
    assert all(np.array_equal(value, new.state[name]) for name, value in old.state.items())
    generator = np.random.default_rng(0)
    x, y = generator.random((6, 1, 8, 8), np.float32), generator.integers(0, 10, 6)
    for graph in ("train", "gradients", "evaluate", "predict"):
        one, two = old.run(graph, x=x, y=y), new.run(graph, x=x, y=y)
        for name, value in one.items():
            np.testing.assert_allclose(value, two[name], atol=1e-6, err_msg=name)


def test_example_learns_digits():
    """Trained from the file with its own defaults, it reads at least 95 % of unseen digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    device = Device(ROOT / "examples" / "digits.bundle")
    images, labels = datasets.load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) * device.manifest.inputs[0].preprocessing[0].scale).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1437], order[1437:]
    for epoch in range(10):
        shuffled = np.random.default_rng(epoch).permutation(train)
        for start in range(0, len(shuffled), 32):
            rows = shuffled[start : start + 32]
            device.train(x=x[rows], y=labels[rows])
    result = device.run("evaluate", x=x[test], y=labels[test])
    assert result["correct"] / result["count"] >= 0.95
    assert sum(np.prod(entry.shape) for entry in device.manifest.parameters) <= 30_000


# Command line -------------------------------------------------------------------------------------------------


def test_command_line_writes_and_inspects(tmp_path, capsys):
    """bundle --json reports what was measured; inspect prints the manifest for people and for programs."""
    path = tmp_path / "model.bundle"
    source = f"{__name__}:dense_arguments"
    assert cli.main(["bundle", source, "-o", str(path), "--momentum", "0.5", "--labels", "a,b,c", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["name"] == "named"
    assert report["parity"]["steps"] == 20
    assert report["hyper"] == {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "clip_norm": 0.0}
    assert "comparing" in captured.err
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "cross_entropy, 3 classes" in text
    assert "weight" in text
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["task"]["labels"] == ["a", "b", "c"]


@pytest.mark.parametrize("function", ["dense", "dense_with_input"])
def test_command_line_takes_modules_and_pairs(tmp_path, capsys, function):
    """A bare module needs --input-shape; a pair brings its example."""
    arguments = ["bundle", f"{__name__}:{function}", "-o", str(tmp_path / "m.bundle")]
    if function == "dense":
        assert cli.main(arguments) == 2
        assert "--input-shape" in capsys.readouterr().err
        arguments += ["--input-shape", "4"]
    assert cli.main(arguments) == 0
    assert "compared with torch: 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("nowhere:build", 2, "cannot import nowhere"),
        ("nowhere", 2, "must be MODULE:FUNCTION"),
        (f"{__name__}:missing", 2, "has no function missing"),
        (f"{__name__}:not_a_model", 2, "returns int"),
        (f"{__name__}:refused", 1, "momentum=None"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, capsys, source, code, message):
    """Wrong input gives 2, a refused model 1; one line each, no traceback."""
    assert cli.main(["bundle", source, "-o", str(tmp_path / "m.bundle")]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("edge-export: ")
    assert message in last


def test_inspect_refuses_other_files(tmp_path, capsys):
    """A missing file and a file of another kind are wrong input."""
    assert cli.main(["inspect", str(tmp_path / "none.bundle")]) == 2
    (tmp_path / "text.bundle").write_text("hello")
    assert cli.main(["inspect", str(tmp_path / "text.bundle")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def _with_data_elsewhere(data: bytes) -> bytes:
    """A graph that reads a tensor from another file."""
    model = onnx.load_from_string(data)
    tensor = model.graph.initializer.add(name="outside", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model.SerializeToString()


@pytest.mark.parametrize(("damage", "said"), [("hash", "does not match its SHA-256"), ("external", "external")])
def test_inspect_verifies_everything(tmp_path, capsys, damage, said):
    """A file with another hash than the manifest says, and a graph with data elsewhere, are refused in one line."""
    path = tmp_path / "model.bundle"
    export_bundle(path=path, parity=False, **dense_arguments())
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in content if name.endswith("predict.onnx"))
    if damage == "hash":
        content[name] = content[name][:-1] + bytes([content[name][-1] ^ 1])
    else:
        content[name] = data = _with_data_elsewhere(content[name])
        manifest = json.loads(content["manifest.json"])
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        content["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
    assert cli.main(["inspect", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_export_without_torch_names_the_extra():
    """Where only the device's packages are installed, exporting says in one line what to install."""
    code = (
        "import sys\nsys.modules['torch'] = None\nimport exporters.cli\n"
        "sys.exit(exporters.cli.main(['bundle', 'a:b', '-o', 'x']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert 'needs torch, which is not installed: pip install "edge-training-runtime[export]"' in line


def test_importing_exporters_and_help_need_no_torch():
    """torch loads on first use only; the public names are those of __all__."""
    code = (
        "import sys, exporters, exporters.cli\n"
        "try:\n    exporters.cli.main(['bundle', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert sorted(dir(exporters)) == ['ExportError', 'ExportReport', 'export_bundle']\n"
        "assert exporters.export_bundle\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "example:" in result.stdout
    assert issubclass(ExportError, EdgeError)
