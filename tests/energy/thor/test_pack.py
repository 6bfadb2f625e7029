"""Probe packs: what is read, and what is refused in words."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from energy.errors import ProfileError
from energy.thor.pack import Pack
from tests.energy.probe_packs import dense_pack, graph, write_pack


def test_a_pack_gives_graphs_and_the_layers_it_was_made_for(tmp_path):
    """Bytes of a probe, and the references by kind with the batch that is asked for."""
    pack = Pack(dense_pack(tmp_path / "a.probes"))
    probe = pack.table.probes[1]
    assert pack.graph(probe) == graph("linear", probe.sizes)
    (reference,) = pack.references(8)["linear"]
    assert reference.sizes == {"batch": 8, "in_channels": 64, "out_channels": 32}
    assert reference.calls == 2
    pack.close()


def test_an_optimiser_has_no_batch():
    """Its sizes are elements alone; a batch of one is no size."""
    from energy.thor.pack import Probe

    assert Probe(file="", role="layer", kind="optimizer-sgd", sizes={"elements": 9}).spec(32).sizes == {"elements": 9}
    assert Probe(file="", role="layer", kind="relu", sizes={"in_positions": 9}).spec(1).sizes == {"in_positions": 9}


def test_damaged_graphs_are_refused(tmp_path):
    """Other bytes than listed, more bytes than listed, and a file that is not there."""
    probes = [("empty", "", {})]
    other = graph("relu", {"in_positions": 3})
    for damage, said in (({"p0.onnx": b"x" * 10}, "SHA-256"), ({"p0.onnx": other * 50}, "larger than the pack says")):
        pack = Pack(write_pack(tmp_path / "a.probes", probes, damage=damage))
        with pytest.raises(ProfileError, match=said):
            pack.graph(pack.table.probes[0])
        pack.close()
    pack = Pack(write_pack(tmp_path / "b.probes", probes, probes=[{"file": "none.onnx", "role": "empty"}]))
    with pytest.raises(ProfileError, match=r"lists no file 'none\.onnx'"):
        pack.graph(pack.table.probes[0])
    pack.close()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"format": "edge-bundle"}, "has format 'edge-bundle', not 'edge-probes'"),
        ({"format_version": 9}, "is newer than this software reads"),
        ({"probes": [{"file": 3, "role": "layer"}]}, "is malformed"),
    ],
)
def test_other_formats_are_refused(tmp_path, table, said):
    """A bundle, a newer pack, and a field of the wrong type."""
    with pytest.raises(ProfileError, match=said):
        Pack(write_pack(tmp_path / "a.probes", [("empty", "", {})], **table))


def test_files_that_are_no_pack_are_refused(tmp_path):
    """No file, no zip, a zip without a table."""
    text = tmp_path / "text"
    text.write_text("hello")
    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()
    for path, said in (
        (tmp_path / "none", "cannot be read"),
        (text, "is no probe pack"),
        (empty, "probes.json cannot"),
    ):
        with pytest.raises(ProfileError, match=said):
            Pack(path)


def test_packs_of_yesterday_are_read():
    """The golden pack of format 1: its table, and a graph whose hash fits."""
    pack = Pack(Path(__file__).parents[1] / "golden" / "format-1.probes")
    roles = [(probe.role, probe.kind, probe.sizes) for probe in pack.table.probes[:3]]
    assert roles == [
        ("empty", "", {}),
        ("layer", "linear", {"in_channels": 64, "out_channels": 32}),
        ("layer", "relu", {"in_positions": 512}),
    ]
    assert pack.table.models[0].layers[0].calls == 2
    assert len(pack.graph(pack.table.probes[1])) == pack.table.files["p1.onnx"].size_bytes
    pack.close()
