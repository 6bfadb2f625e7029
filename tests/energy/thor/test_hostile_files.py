"""Files that somebody else wrote: profiles, packs, calibrations and bundles that lie get one line, no traceback."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from energy import cli  # noqa: E402
from energy.errors import ProfileError, UsageError  # noqa: E402
from energy.thor.bundle import bundle_layers, bundle_step  # noqa: E402
from energy.thor.pack import Pack  # noqa: E402
from energy.thor.profile import save_profile  # noqa: E402
from tests.energy.probe_packs import dense, write_pack  # noqa: E402
from tests.energy.synthetic_layers import cost, draw, profile  # noqa: E402

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits.bundle"
HUGE = 10**400


def refused(capsys, *arguments, codes=(1, 2)):
    """Runs a command that must fail in words; gives its last line, before which it may say what it does."""
    code = cli.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip()
    assert code in codes, error
    assert all(line.startswith("edge-energy: ") for line in error.splitlines()), error
    said = [line for line in error.splitlines() if line != "edge-energy: profiling by CPU seconds"]
    assert len(said) == 1, error
    return said[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound profile as plain JSON, of the kind ``linear``, which the digits model has."""
    rows = [
        {name: size[name] for name in ("batch", "in_channels", "out_channels")}
        for size in draw(np.random.default_rng(0), 12)
    ]
    path = tmp_path_factory.mktemp("good") / "profile.json"
    joules = [cost({**row, "in_positions": 1, "out_positions": 1}) for row in rows]
    save_profile(profile(rows, joules, kind="linear"), path)
    return json.loads(path.read_text())


def put(raw, place, value):
    """A copy with another value at ``place``: keys and indices joined by dots."""
    raw = copy.deepcopy(raw)
    *way, last = place.split(".")
    at = raw
    for step in way:
        at = at[int(step) if isinstance(at, list) else step]
    at[int(last) if isinstance(at, list) else last] = value
    return raw


def test_sound_files_pass(good, tmp_path):
    """What the lies below are told about: a profile and a bundle that are well."""
    path = tmp_path / "energy-profile.json"
    path.write_text(json.dumps(good))
    assert cli.main(["predict", str(path), str(bundle(tmp_path)), "--allow-missing"]) == 0
    assert cli.main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 0


MODEL = "families.0.fitted.joules"
PROFILE_LIES = [
    (f"{MODEL}.parameters.signal", [1e200]),
    (f"{MODEL}.parameters.signal", [1e29]),
    (f"{MODEL}.parameters.length", [0.0]),
    (f"{MODEL}.parameters.scale", [0.0]),
    (f"{MODEL}.parameters.noise", [-1.0]),
    (f"{MODEL}.parameters.offset", [1e4]),
    (f"{MODEL}.parameters.center", [1e29]),
    (f"{MODEL}.parameters.doubt", [-1.0] * 12),
    (f"{MODEL}.parameters.roofline", [0.0, 0.0, 0.0, 0.0, 1.0]),
    (f"{MODEL}.parameters.roofline", [1.0, -1.0, 0.0, 0.0, 0.0]),
    (f"{MODEL}.spread", 1e9),
    (f"{MODEL}.spread", 0),
    ("families.0.points.0.sizes.batch", HUGE),
    ("families.0.points.0.sizes.batch", 0),
    ("families.0.points.0.sizes.batch", -3),
    ("families.0.points.0.costs.joules.mean", -1.0),
    ("families.0.points.0.costs.joules.mean", None),
    ("families.0.points.0.costs.joules.mean", 0.0),
    ("families.0.points.0.costs.joules.relative_error", None),
    ("families.0.points.0.costs.joules.relative_error", 1e300),
    ("families.0.points.0.costs.joules.repeats", -1),
    ("families.0.kind", "two\nlines"),
    ("factor", {"joules": 0.0}),
    ("factor", {"joules": -1.0}),
    ("factor_error", {"joules": -1.0}),
    ("factor_error", {"joules": 1e200}),
    ("created_unix_s", 1e30),
    ("profiling_seconds", -1.0),
    ("fixed", {"joules": -5.0}),
    ("idle_watts", 1e300),
    ("power", [[0.0, 1e300]]),
    ("device.threads", 0),
    ("format_version", HUGE),
]


@pytest.mark.parametrize(("place", "value"), PROFILE_LIES)
def test_profiles_with_numbers_that_cannot_be(good, tmp_path, capsys, place, value):
    """Predicting from them and reporting on them fails in one line."""
    path = tmp_path / "energy-profile.json"
    text = json.dumps(put(good, place, "HERE")).replace(
        '"HERE"', "1" + "0" * 400 if value == HUGE else json.dumps(value)
    )
    path.write_text(text)
    refused(capsys, "predict", path, DIGITS, "--allow-missing", codes=(1,))
    refused(capsys, "report", path, "-o", tmp_path / "report.html", codes=(1,))


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[" * 100_000, b"\xff\xfe{}", b"null", b'{"format": "edge-energy-profile"}']
)
def test_files_that_are_no_profile(tmp_path, capsys, data):
    """Empty, cut off, nested without end, of another encoding, of nothing."""
    path = tmp_path / "energy-profile.json"
    path.write_bytes(data)
    refused(capsys, "predict", path, DIGITS, codes=(1,))
    refused(capsys, "report", path, "-o", tmp_path / "report.html", codes=(1,))


def table_pack(tmp_path, **table):
    return write_pack(tmp_path / "a.probes", [("empty", "", {}), dense("layer", 64, 32)], **table)


def row(**changes):
    return {"file": "p1.onnx", "role": "layer", "kind": "linear", "sizes": {"in_channels": 64}, **changes}


PACK_LIES = [
    {"batch": -3},
    {"batch": 10**12},
    {"batch": HUGE},
    {"probes": [row(runs=0)]},
    {"probes": [row(runs=-1)]},
    {"probes": [row(batch=0)]},
    {"probes": [row(sizes={"in_channels": HUGE})]},
    {"probes": [row(sizes={"in_channels": 0})]},
    {"probes": [row(limits={"y": 0})]},
    {"probes": [row(limits={"y": 10**12})]},
    {"probes": [row(kind="a\nb")]},
    {"models": [{"name": "net", "layers": [["linear", {"in_channels": 64}, -1]]}]},
    {"models": [{"name": "net", "layers": [["linear", {"in_channels": -64}, 1]]}]},
    {"files": {"p1.onnx": {"sha256": "", "size_bytes": -1}}},
    {"format_version": HUGE},
]


@pytest.mark.parametrize("table", PACK_LIES)
def test_packs_with_numbers_that_cannot_be(tmp_path, capsys, table):
    """Profiling with them fails in one line, before anything is measured."""
    pack = table_pack(tmp_path, **table)
    refused(capsys, "profile", pack, "-o", tmp_path / "p.json", "--measure-only", "--sensor", "none", codes=(1,))


def model_bytes(nodes, *, initializers=(), inputs=(), domain=""):
    helper = pytest.importorskip("onnx").helper
    out = helper.make_tensor_value_info("out", 1, None)
    body = helper.make_graph(list(nodes), "g", list(inputs), [out], initializer=list(initializers))
    return helper.make_model(body, opset_imports=[helper.make_opsetid(domain, 20)], ir_version=9).SerializeToString()


def reading_a_file():
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret.bin")
    return model_bytes([onnx.helper.make_node("Identity", ["t"], ["out"])], initializers=[tensor])


def filling_memory():
    onnx = pytest.importorskip("onnx")
    shape = onnx.helper.make_tensor("s", 7, [1], [1 << 50])
    nodes = [onnx.helper.make_node("ConstantOfShape", ["s"], ["big"])]
    nodes.append(onnx.helper.make_node("ReduceSum", ["big"], ["out"]))
    return model_bytes(nodes, initializers=[shape])


def wide_input():
    onnx = pytest.importorskip("onnx")
    x = onnx.helper.make_tensor_value_info("x", 1, [1 << 40, 1 << 40])
    return model_bytes([onnx.helper.make_node("Identity", ["x"], ["out"])], inputs=[x])


GRAPHS = [
    (reading_a_file, "external data"),
    (lambda: model_bytes([], domain="com.evil"), "only standard ONNX operators"),
    (lambda: b"nonsense", "no valid ONNX model"),
    (lambda: b"", "holds no graph"),
    (filling_memory, "onnxruntime"),
    (wide_input, "which no layer has"),
]


@pytest.mark.parametrize(("graph", "said"), GRAPHS)
def test_graphs_of_a_pack_that_a_device_must_not_load(tmp_path, capsys, monkeypatch, graph, said):
    """Files of the folder, foreign operators, more memory than there is; the hash of all is right."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4)
    data = graph()
    files = {"p0.onnx": {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}}
    pack = write_pack(tmp_path / "a.probes", [("empty", "", {})], damage={"p0.onnx": data}, files=files)
    error = refused(capsys, "profile", pack, "-o", "p.json", "--measure-only", "--sensor", "none", codes=(1,))
    assert said in error


@pytest.mark.parametrize("graph", [reading_a_file, filling_memory, wide_input])
def test_nothing_runs_a_graph_unchecked(graph, tmp_path, monkeypatch):
    """What runs probes and anchors looks graphs over itself, wherever they come from."""
    pytest.importorskip("onnxruntime")
    from energy.thor.probing import Stepper

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4)
    with pytest.raises(ProfileError):
        Stepper(graph(), batch=1)


def test_zips_that_lie(tmp_path):
    """Damaged compression, another method, a password, a cut file: of packs and bundles."""
    sound = table_pack(tmp_path).read_bytes()
    at = sound.index(b"probes.json") + len(b"probes.json")
    spoiled = sound[:at] + bytes(byte ^ 0xA5 for byte in sound[at : at + 40]) + sound[at + 40 :]
    central = sound.rindex(b"PK\x01\x02")
    first = sound.index(b"PK\x01\x02")
    method = bytearray(sound)
    method[first + 10 : first + 12], method[8:10] = b"\x63\0", b"\x63\0"
    secret = bytearray(sound)
    secret[first + 8] |= 1
    secret[6] |= 1
    for number, data in enumerate((spoiled, bytes(method), bytes(secret), sound[:central], sound[: len(sound) // 2])):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        with pytest.raises(ProfileError):
            Pack(path)
        renamed = tmp_path / f"{number}.bundle"
        renamed.write_bytes(data.replace(b"probes.json", b"manifest.js"))
        with pytest.raises(ProfileError):
            bundle_layers(renamed)


def bundle(tmp_path, change=None, graph=None):
    """The digits bundle with another manifest, and another training graph whose hash is right."""
    with zipfile.ZipFile(DIGITS) as archive:
        manifest, data = json.loads(archive.read("manifest.json")), archive.read("train.onnx")
    if graph is not None:
        data = graph
        manifest["files"]["train.onnx"]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest if change is None else put(manifest, change[0], "HERE"))
    if change is not None:
        text = text.replace('"HERE"', "1" + "0" * 400 if change[1] == HUGE else json.dumps(change[1]))
    path = tmp_path / "net.bundle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", text)
        archive.writestr("train.onnx", data)
    return path


BUNDLE_LIES = [
    ("layers", 3),
    ("layers", [3]),
    ("layers.0.settings", []),
    ("layers.0.kind", 5),
    ("layers.0.name", "two\nlines"),
    ("layers.0.input_shape", [HUGE]),
    ("layers.0.input_shape", "abc"),
    ("layers.0.calls", -2),
    ("layers.0.calls", 1e400),
    (
        "layers.0",
        {
            "name": "r",
            "kind": "LSTM",
            "input_shape": [8, 4],
            "output_shape": [8, 4],
            "settings": {"hidden_size": 4, "num_layers": 10**9},
        },
    ),
    ("parameters.0.shape", [-1]),
    ("parameters", {"a": 1}),
    ("optimizer", None),
    ("batch", {"mode": "fixed", "size": 10**18}),
    ("batch", 7),
]


@pytest.mark.parametrize(("place", "value"), BUNDLE_LIES)
def test_bundles_with_a_layer_table_that_cannot_be(good, tmp_path, capsys, place, value):
    """Predicting a hostile bundle, and metering one as an anchor, fails in one line."""
    path, sound = bundle(tmp_path, (place, value)), tmp_path / "energy-profile.json"
    if isinstance(value, list) and value == [HUGE]:
        path = bundle(tmp_path, (f"{place}.0", HUGE))
    sound.write_text(json.dumps(good))
    refused(capsys, "predict", sound, path, "--allow-missing", codes=(1,))
    with pytest.raises((ProfileError, UsageError)):
        bundle_step(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("files", {}),
        ("files", 3),
        ("task.classes", -5),
        ("task.classes", HUGE),
        ("task.classes", [3]),
        ("task", None),
        ("optimizer.hyper", {"lr": "fast"}),
        ("optimizer.hyper", {"lr": HUGE}),
        ("optimizer.hyper", 4),
        ("files.train.onnx", 1),
    ],
)
def test_bundles_that_cannot_be_metered(tmp_path, place, value):
    """What is fed to a whole model comes from its manifest, which may lie."""
    if place == "files.train.onnx":
        place = "files"
        value = {"train.onnx": value}
    with pytest.raises(ProfileError, match="damaged"):
        bundle_step(bundle(tmp_path, (place, value)))


@pytest.mark.parametrize(("graph", "said"), GRAPHS[:4])
def test_training_graphs_of_bundles_are_looked_over(tmp_path, graph, said):
    """An anchor is a graph from elsewhere, like a probe."""
    with pytest.raises(ProfileError, match=said):
        bundle_step(bundle(tmp_path, graph=graph()))


def test_a_sound_bundle_can_be_metered(tmp_path):
    """The step of the example: its graph as in the file, classes as the limit of its labels, its optimiser's values."""
    with zipfile.ZipFile(DIGITS) as archive:
        data, manifest = archive.read("train.onnx"), json.loads(archive.read("manifest.json"))
    step = bundle_step(DIGITS, 8)
    assert step.graph == data
    assert step.limits["y"] == manifest["task"]["classes"]
    assert step.hyper == manifest["optimizer"]["hyper"]
    assert step.layers == bundle_layers(DIGITS, 8).layers
    folder = tmp_path / "folder"
    shutil.unpack_archive(DIGITS, folder, "zip")
    assert bundle_step(folder, 8).graph == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"format": "edge-energy-model"}',
        '{"format": "edge-energy-model", "format_version": 1, "idle_watts": NaN, "busy_watts": 2, "cores": 1}',
        '{"format": "edge-energy-model", "format_version": 1, "idle_watts": 1, "busy_watts": 1e999, "cores": 1}',
        '{"format": "edge-energy-model", "format_version": 1, "idle_watts": 1, "busy_watts": 2, "cores": 1e999}',
        '{"format": "edge-energy-model", "format_version": 1, "idle_watts": 1' + "0" * 400 + "}",
    ],
)
def test_calibrations_that_cannot_be(tmp_path, capsys, text):
    """``--model`` with such a file is refused in one line."""
    path = tmp_path / "modelled.json"
    path.write_text(text)
    refused(capsys, "measure", "--model", path, "--", "true")
