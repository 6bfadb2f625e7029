"""Every codec: what goes in comes out, what is damaged is refused, and yesterday's bytes still decode."""

import contextlib
import os
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import msgspec
import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout, Packet, codec_names, decode, encode, registry
from edge_runtime.compression.frame import decode_frame, encode_frame
from edge_runtime.errors import CodecError

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = Layout(("w", "b"), ((4, 3), (3,)))
LAYOUTS = {"delta": LAYOUT}
VECTOR = np.linspace(-2, 2, 15, dtype=np.float32)
LOSSLESS = ("raw", "zstd")


@pytest.mark.parametrize("codec", codec_names())
def test_a_vector_survives(codec):
    """The right size and type come back; lossless codecs give the same bits."""
    data, _ = encode(codec, {"delta": VECTOR}, LAYOUTS)
    out = decode(data, LAYOUTS)
    assert out.keys() == {"delta"}
    assert out["delta"].dtype == np.float32
    assert out["delta"].shape == (15,)
    if codec in LOSSLESS:
        np.testing.assert_array_equal(out["delta"], VECTOR)


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("layout", [Layout((), ()), Layout(("e",), ((0, 4),)), Layout(("s",), ((),))])
def test_empty_and_scalar_layouts_survive(codec, layout):
    """Models of no or one number are no special case."""
    vector = np.ones(layout.size, np.float32)
    out = decode(encode(codec, {"delta": vector}, {"delta": layout})[0], {"delta": layout})["delta"]
    assert out.shape == (layout.size,)


@pytest.mark.parametrize("codec", codec_names())
@given(size=st.one_of(st.integers(0, 600), st.sampled_from([8192, 8224, 65568])))
@settings(max_examples=40, deadline=None)
def test_any_size_survives(codec, size):
    """No size of a vector makes the header ambiguous."""
    layouts = {"delta": Layout(("w",), ((size,),))}
    vector = np.arange(size, dtype=np.float32)
    np.testing.assert_allclose(decode(encode(codec, {"delta": vector}, layouts)[0], layouts)["delta"], vector)


@pytest.mark.parametrize("codec", codec_names())
def test_several_channels_keep_apart(codec):
    """Methods may send more than one vector."""
    layouts = {"delta": LAYOUT, "control": Layout(("c",), ((7,),))}
    vectors = {"control": np.arange(7, dtype=np.float32), "delta": VECTOR}
    out = decode(encode(codec, vectors, layouts)[0], layouts)
    assert {name: vector.shape for name, vector in out.items()} == {"control": (7,), "delta": (15,)}


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_tensor(codec, value):
    """Neither end lets NaN or infinity through."""
    bad = VECTOR.copy()
    bad[13] = value
    with pytest.raises(CodecError, match="NaN or infinite value in tensor 'b'"):
        encode(codec, {"delta": bad}, LAYOUTS)


def test_a_received_nan_is_refused():
    """A frame that a broken device made is refused at the receiver."""
    bad = VECTOR.copy()
    bad[2] = np.nan
    data = encode_frame({"delta": Packet({"values": bad})}, registry.stages("raw"))
    with pytest.raises(CodecError, match="tensor 'w'"):
        decode(data, LAYOUTS)


@pytest.mark.parametrize("codec", codec_names())
def test_every_truncation_and_extension_is_refused(codec):
    """A frame cut off anywhere, or with bytes behind, never decodes."""
    data, _ = encode(codec, {"delta": VECTOR}, LAYOUTS)
    for length in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:length], LAYOUTS)
    with pytest.raises(CodecError):
        decode(data + b"\0", LAYOUTS)


@pytest.mark.parametrize("codec", codec_names())
@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_damaged_frames_never_crash(codec, flips):
    """Flipped bytes give a CodecError or, in raw values, another finite vector of the right size."""
    data = bytearray(encode(codec, {"delta": VECTOR}, LAYOUTS)[0])
    for at, mask in flips:
        data[at % len(data)] ^= mask
    with contextlib.suppress(CodecError):
        out = decode(bytes(data), LAYOUTS)["delta"]
        assert out.shape == (15,)
        assert np.isfinite(out).all()


@settings(max_examples=200, deadline=None)
@given(
    header=st.recursive(
        st.none() | st.integers(-99, 1 << 63) | st.text(max_size=5), lambda s: st.lists(s, max_size=4), max_leaves=9
    )
)
def test_any_header_never_crashes(header):
    """A header of any content gives a CodecError."""
    packed = msgspec.msgpack.encode(header)
    padding = -len(packed) % 4
    data = b"EFRM" + bytes([1, 0, padding, 0]) + (len(packed) + padding).to_bytes(4, "little") + packed + bytes(padding)
    with pytest.raises(CodecError):
        decode(data, LAYOUTS)


def frame(stages=(("raw", {}),), channels=("delta",), arrays=((0, "values", "f4", [15]),), body=None, version=1):
    header = msgspec.msgpack.encode([stages, channels, arrays])
    padding = -len(header) % 4
    prefix = b"EFRM" + bytes([version, 0, padding, 0]) + (len(header) + padding).to_bytes(4, "little")
    return prefix + header + bytes(padding) + (VECTOR.tobytes() if body is None else body)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF89a" + bytes(30), "bad magic"),
        (frame(version=2), "frame version 2 .*update edge-training-runtime"),
        (frame(stages=[("magic", {})]), "stage 'magic' is unknown here; known: raw, zstd"),
        (frame(stages=[("raw", {"level": 3})]), "takes no configuration"),
        (frame(stages=[("raw", {})] * 9), "too many stages"),
        (frame(channels=["model"]), r"carries channels \['model'\], expected \['delta'\]"),
        (frame(channels=["delta", "delta"]), "carries channels"),
        (frame(arrays=[(0, "values", "f8", [15])]), "'f8', which is not allowed"),
        (frame(arrays=[(0, "values", "O", [15])]), "'O', which is not allowed"),
        (frame(arrays=[(0, "values", "f4", [1 << 40])]), "more bytes than its layout allows"),
        (frame(arrays=[(0, "values", "f4", [-1])]), "impossible shape"),
        (frame(arrays=[(0, "values", "f4", [14])]), "4 bytes too many"),
        (frame(arrays=[(0, "values", "f4", [16])]), "needs 64 bytes, the frame has 60 left"),
        (frame(arrays=[(1, "values", "f4", [15])]), "channel 1, which the frame does not have"),
        (frame(arrays=[(0, "values", "i4", [15])]), "one float32 array"),
        (frame(arrays=[(0, "values", "f4", [3, 5])]), r"has shape \(3, 5\)"),
        (frame(arrays=[(0, "v", "f4", [7]), (0, "v", "f4", [8])]), "comes twice"),
        (frame(stages=[]), None),
    ],
)
def test_hand_made_frames(data, reason):
    """What a hostile sender may write is refused, and the message says what it was."""
    if reason is None:
        np.testing.assert_array_equal(decode(data, LAYOUTS)["delta"], VECTOR)
        return
    with pytest.raises(CodecError, match=reason):
        decode(data, LAYOUTS)


def test_a_zstd_bomb_is_refused_before_memory_is_taken():
    """The size that the compressed data claims is checked against the layout first."""
    bomb = zstd.compress(bytes(50_000_000))
    for shape in ([15], [12_500_000]):
        table = msgspec.msgpack.encode([["values", "f4", shape]])
        arrays = [(0, "t", "u1", [len(table)]), (0, "z", "u1", [len(bomb)])]
        data = frame(stages=[("raw", {}), ("zstd", {})], arrays=arrays, body=table + bomb)
        with pytest.raises(CodecError, match=r"does not hold the 60 bytes|more than the layout allows"):
            decode(data, LAYOUTS)


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        ({"other": VECTOR}, "channels"),
        ({"delta": VECTOR[:3]}, "expected float32"),
        ({"delta": VECTOR.astype(np.float64)}, "expected float32"),
    ],
)
def test_wrong_input_is_refused(vectors, reason):
    """The sender finds its own mistakes."""
    with pytest.raises(CodecError, match=reason):
        encode("raw", vectors, LAYOUTS)


def test_an_unknown_codec_lists_the_known():
    """A job that names a codec this software lacks fails with the names it has."""
    with pytest.raises(CodecError, match="codec 'best' is unknown here; known: raw, zstd"):
        encode("best", {"delta": VECTOR}, LAYOUTS)


class Counter:
    """A third-party stage with state: adds how often it was called to a side array."""

    name = "counter"

    def config(self):
        return {"step": 1}

    @classmethod
    def from_config(cls, config):
        assert config == {"step": 1}
        return cls()

    def encode(self, packet, _layout, state):
        count = int.from_bytes(state, "little") + 1
        return Packet({**packet.arrays, "n": np.array([count], np.int64)}), count.to_bytes(4, "little")

    def decode(self, packet, layout):
        values = packet.arrays["values"]
        return Packet({"values": values * np.float32(packet.arrays["n"][0])} if layout.size else {"values": values})


def test_a_packages_stage_is_found_by_entry_point_and_keeps_its_state(monkeypatch):
    """State goes in and out explicitly, so rounds can be interrupted between any two."""
    entry = EntryPoint("counter", f"{__name__}:Counter", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda _self: Counter)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"counter": entry})
    monkeypatch.setattr(registry, "_loaded", {})
    assert codec_names() == ["counter", "raw", "zstd"]
    first, state = encode("counter", {"delta": VECTOR}, LAYOUTS)
    second, state2 = encode("counter", {"delta": VECTOR}, LAYOUTS, state)
    np.testing.assert_array_equal(decode(first, LAYOUTS)["delta"], VECTOR)
    np.testing.assert_array_equal(decode(second, LAYOUTS)["delta"], VECTOR * 2)
    assert encode("counter", {"delta": VECTOR}, LAYOUTS, state) == (second, state2)
    with pytest.raises(CodecError, match="another codec"):
        encode("zstd", {"delta": VECTOR}, LAYOUTS, state)


def test_raw_costs_one_copy_and_decodes_without_any():
    """A large update does not cost the device time or memory beyond its bytes."""
    layout = {"delta": Layout(("w",), ((1_200_000,),))}
    vector = np.random.default_rng(0).normal(size=1_200_000).astype(np.float32)
    data, _ = encode("raw", {"delta": vector}, layout)
    decoded = decode(data, layout)["delta"]
    assert len(data) < vector.nbytes + 100
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))
    assert decoded.flags.aligned
    times = []
    for _ in range(10):
        began = time.process_time()
        decode(encode("raw", {"delta": vector}, layout)[0], layout)
        times.append(time.process_time() - began)
    assert min(times) < 0.02


def test_names_and_messages_import_nothing_heavy():
    """The daemon announces its codecs and speaks to the worker without numpy."""
    code = (
        "import sys, edge_runtime.compression as c, edge_runtime.agent.pipe, edge_runtime.methods as m\n"
        "assert c.codec_names() and m.method_names()\n"
        "bad = {'numpy', 'onnxruntime', 'backports.zstd', 'safetensors'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_yesterdays_bytes_still_decode(codec):
    """Frames written by the first release of the format; EDGE_GOLDEN=1 writes those that are missing."""
    path = GOLDEN / f"{codec}.frame"
    if os.environ.get("EDGE_GOLDEN") and not path.exists():
        path.write_bytes(encode(codec, {"delta": VECTOR}, LAYOUTS)[0])
    np.testing.assert_array_equal(decode(path.read_bytes(), LAYOUTS)["delta"], VECTOR)


def test_the_raw_frame_is_written_as_it_always_was():
    """The plain format is stable byte by byte."""
    assert encode("raw", {"delta": VECTOR}, LAYOUTS)[0] == (GOLDEN / "raw.frame").read_bytes()


def test_wide_arrays_come_first_so_all_are_aligned():
    """Arrays of any widths decode in place."""

    class Mixed:
        name = "raw"

        def config(self):
            return {}

    packet = Packet({"a": np.arange(3, dtype=np.uint8), "values": VECTOR, "b": np.arange(5, dtype=np.int64)})
    data = encode_frame({"delta": packet}, [Mixed()])
    with pytest.raises(CodecError, match="one float32 array"):
        decode_frame(data, LAYOUTS)
    at = data.index(VECTOR.tobytes())
    assert at % 4 == 0
    assert data.index(np.arange(5, dtype=np.int64).tobytes()) < at < len(data) - 3
