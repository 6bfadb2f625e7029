"""Opening bundles: what is right is read, everything else is refused in one line."""

import struct
import zipfile

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from edge_runtime.bundle import Bundle
from edge_runtime.bundle import manifest as m
from edge_runtime.errors import BundleError
from tests.edge_runtime import toy_bundle


@pytest.fixture
def path(tmp_path):
    return toy_bundle.write_bundle(tmp_path / "toy.bundle")


def rebuilt(tmp_path, *, files=None, **changes):
    """The toy with other files (their hashes listed rightly) or another manifest."""
    content = {**toy_bundle.files(), **(files or {})}
    manifest = toy_bundle.manifest(content, **changes)
    path = tmp_path / "other.bundle"
    return toy_bundle.write_zip(path, {m.MANIFEST_NAME: m.encode_manifest(manifest), **content})


def listed(tmp_path, content, entries):
    manifest = msgspec.structs.replace(toy_bundle.manifest(content), files=entries)
    return toy_bundle.write_zip(tmp_path / "l.bundle", {m.MANIFEST_NAME: m.encode_manifest(manifest), **content})


def test_bundle_gives_its_tensors_graphs_and_hash(path):
    """Everything a device needs comes out of the zip, verified."""
    bundle = Bundle.open(path)
    tensors = bundle.initial_tensors()
    assert list(tensors) == ["w", "b", "seen", "frozen", "count"]
    np.testing.assert_array_equal(tensors["w"], toy_bundle.tensors()["w"])
    assert bundle.graph("train") == toy_bundle.files()["train.onnx"]
    assert bundle.sha256 == toy_bundle.sha256(path.read_bytes())
    assert bundle.manifest.name == "toy"


def test_only_trainable_parameters_and_float_buffers_travel(path):
    """Frozen tensors and counters are not part of the vector."""
    bundle = Bundle.open(path)
    layout = bundle.layout()
    assert layout.names == ("w", "b", "seen")
    assert layout.size == 12 + 3 + 2
    np.testing.assert_array_equal(bundle.initial_vector()[-2:], [1, 1])


def test_a_folder_works_like_the_zip(path, tmp_path):
    """The same files in a folder are the same bundle."""
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "folder")
    folder = Bundle.open(tmp_path / "folder")
    assert folder.graph("train") == Bundle.open(path).graph("train")
    assert folder.manifest == Bundle.open(path).manifest
    (tmp_path / "folder" / "train.onnx").write_bytes(b"x" * len(folder.graph("train")))
    with pytest.raises(BundleError, match=r"train.onnx: does not match its SHA-256"):
        folder.graph("train")
    (tmp_path / "folder" / "train.onnx").unlink()
    with pytest.raises(BundleError, match=r"'train.onnx' is missing"):
        Bundle.open(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bundle or cut off"),
        (b"hello, this is no zip at all, but long enough", "no bundle or cut off"),
        (b"PK\5\6" + bytes(18), "has no manifest.json"),
        (b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 60000, 60000, 1 << 25, 0, 0), "holds 60000 files"),
        (b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, 500, 0, 0), "damaged zip"),
    ],
)
def test_what_is_no_zip_is_refused(tmp_path, content, reason):
    """A wrong or damaged file gives one clear line that names the file."""
    path = tmp_path / "bad.bundle"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=reason) as caught:
        Bundle.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """A path that does not exist is an error of the bundle, not a traceback."""
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path / "nothing.bundle")


def test_every_truncation_is_refused(path, tmp_path):
    """A bundle cut off anywhere never opens."""
    data = path.read_bytes()
    short = tmp_path / "short.bundle"
    for length in range(0, len(data), 97):
        short.write_bytes(data[:length])
        with pytest.raises(BundleError):
            Bundle.open(short)


def test_a_flipped_byte_is_found(path, tmp_path):
    """Damage of any file's content is found when that file is read."""
    data = bytearray(path.read_bytes())
    data[data.index(toy_bundle.files()["train.onnx"]) + 100] ^= 1
    (tmp_path / "flipped.bundle").write_bytes(data)
    with pytest.raises(BundleError, match=r"train.onnx: .*(damaged|SHA-256)"):
        Bundle.open(tmp_path / "flipped.bundle").graph("train")


def test_deflated_bundles_are_refused(tmp_path):
    """A zip bomb has no way in, since nothing may be compressed."""
    content = toy_bundle.files()
    listed = {m.MANIFEST_NAME: m.encode_manifest(toy_bundle.manifest(content)), **content}
    path = toy_bundle.write_zip(tmp_path / "bomb.bundle", listed, zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="is compressed or encrypted"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\b", "x" * 3 + "/" * 2 + "y", "extra.bin"])
def test_entries_with_bad_names_or_unlisted_are_refused(path, name):
    """No entry can point out of the bundle or hide in it."""
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"data")
    with pytest.raises(BundleError, match=r"unusable name|does not list"):
        Bundle.open(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_comes_twice_is_refused(path):
    """Two readers could see two different files."""
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train.onnx", b"other")
    with pytest.raises(BundleError, match="holds a file twice"):
        Bundle.open(path)


def test_manifest_names_cannot_leave_the_folder(tmp_path):
    """A manifest that lists a path outside is refused before anything is read."""
    content = toy_bundle.files()
    entries = {
        name: m.FileEntry(sha256=toy_bundle.sha256(data), size_bytes=len(data)) for name, data in content.items()
    }
    entries["../../etc/passwd"] = m.FileEntry(sha256="0" * 64, size_bytes=10)
    with pytest.raises(BundleError, match="unusable name"):
        Bundle.open(listed(tmp_path, content, entries))


def test_a_wrong_size_in_the_manifest_is_refused(tmp_path):
    """Sizes are checked before a byte is read."""
    content = toy_bundle.files()
    entries = dict(toy_bundle.manifest(content).files)
    entries["train.onnx"] = m.FileEntry(sha256=entries["train.onnx"].sha256, size_bytes=5)
    with pytest.raises(BundleError, match="the manifest says 5"):
        Bundle.open(listed(tmp_path, content, entries)).graph("train")


def test_a_parameter_table_larger_than_the_file_is_refused(tmp_path):
    """A manifest cannot make a device allocate what is not there."""
    table = [m.Parameter(name="w", shape=(1 << 20, 1 << 10), dtype="float32", trainable=True, buffer=False, layer="l")]
    with pytest.raises(BundleError, match="the parameter table needs 4294967296 bytes"):
        Bundle.open(rebuilt(tmp_path, parameters=table))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w": np.zeros((3, 4), np.float32)}, "'w' is float32 (3, 4), the manifest says float32 (4, 3)"),
        ({"w": np.zeros((4, 3), np.float64)}, "'w' is float64"),
        ({"w": np.full((4, 3), np.nan, np.float32)}, "'w' holds a NaN"),
        ({"other": np.zeros(1, np.float32)}, "'other', which the manifest does not list"),
        ({"b": None}, "lacks 'b'"),
    ],
)
def test_tensors_must_match_the_table(tmp_path, change, reason):
    """Initial parameters are exactly those of the table, and finite."""
    tensors = {name: tensor for name, tensor in {**toy_bundle.tensors(), **change}.items() if tensor is not None}
    files = {m.PARAMETERS_NAME: safetensors.numpy.save(tensors)}
    table = toy_bundle.manifest(toy_bundle.files()).parameters
    bundle = Bundle.open(rebuilt(tmp_path, files=files, parameters=table))
    with pytest.raises(BundleError) as caught:
        bundle.initial_tensors()
    assert reason in str(caught.value)


def test_damaged_tensors_are_refused(tmp_path):
    """A parameters file that is no safetensors gives one clear line."""
    bundle = Bundle.open(rebuilt(tmp_path, files={m.PARAMETERS_NAME: b"\xff" * 500}))
    with pytest.raises(BundleError, match=r"parameters.safetensors: cannot be read"):
        bundle.initial_tensors()


def test_newer_formats_say_update(tmp_path):
    """A bundle of tomorrow's exporter names the cure."""
    with pytest.raises(BundleError, match="update edge-training-runtime"):
        Bundle.open(rebuilt(tmp_path, format_version=2))


def test_missing_graphs_and_variants_list_what_there_is(path):
    """A job that asks for what the bundle does not have is told what it has."""
    bundle = Bundle.open(path)
    with pytest.raises(BundleError, match="has no graph 'distil'; it has train, gradients"):
        bundle.graph("distil")
    with pytest.raises(BundleError, match="has no variant 'last'; it has none"):
        bundle.graph("train", "last")


def test_a_variant_evaluates_with_the_models_own_graph(tmp_path):
    """Only what a variant changes is in it; training graphs are never mixed."""
    train = m.Graph(file="gradients.onnx", inputs=[], outputs=[])
    bundle = Bundle.open(rebuilt(tmp_path, variants=[m.Variant(name="last", graphs={"train": train})]))
    assert bundle.graph_entry("train", "last").file == "gradients.onnx"
    assert bundle.graph_entry("evaluate", "last").file == "evaluate.onnx"
    with pytest.raises(BundleError, match="has no graph 'update' in variant 'last'"):
        bundle.graph_entry("update", "last")
