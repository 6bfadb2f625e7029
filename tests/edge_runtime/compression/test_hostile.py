"""Hostile bytes: a short run of the program that makes them, and bombs made by hand."""

import tracemalloc

import numpy as np
import pytest
from backports import zstd

from edge_runtime.compression import Layout, codec_names
from edge_runtime.compression.container import Header, pack
from edge_runtime.compression.pipeline import CodecSpec, decode, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError
from tests.support.fuzz_codecs import all_codecs, fuzz, replay
from tests.support.hostile_bytes import corpus, make_case

LAYOUT = Layout(("w", "b"), ((30, 20), (20,)))
LAYOUTS = {"delta": LAYOUT}
CASES = 600


@pytest.mark.parametrize("codec", all_codecs())
def test_hostile_bytes_are_refused_or_harmless(codec):
    """A short run per codec; the long one is ``python -m tests.support.fuzz_codecs --count 1000000``."""
    counts = fuzz(corpus([codec]), seed=1, numbers=range(CASES))[codec]
    assert counts["tried"] == CASES
    assert counts["refused"] > CASES // 2


def test_hostile_bytes_of_all_codecs_together():
    """Splices and wrong codec numbers cross the codecs; a case depends on nothing but seed and number."""
    blobs = corpus(all_codecs())
    counts = fuzz(blobs, seed=2, numbers=range(2000))
    assert sum(count["tried"] for count in counts.values()) == 2000
    assert make_case(blobs, 2, 77) == make_case(blobs, 2, 77)
    assert make_case(blobs, 2, 77).data != make_case(blobs, 3, 77).data
    assert replay(2, 77, all_codecs()).endswith("--seed 2 --start 77 --count 1")
    assert replay(2, 77, ["raw"]).endswith("--count 1 --codecs raw")


def sealed(codec, payload):
    return pack(Header(codec=codec_class(codec).number), LAYOUTS, [[payload]])


def frame_with_claim(size):
    """A Zstandard frame whose header claims a size that it does not hold."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00"


ZSTD_PREFIX = {"zstd": b"", "half": bytes(2), "int8": bytes(8) + b"\0", "int4": bytes(8) + b"\0"}
BOMBS = {
    "200 MB of zeros": zstd.compress(bytes(200_000_000)),
    "claims 2^62 bytes": frame_with_claim(1 << 62),
    "claims 1 GB": frame_with_claim(1 << 30),
    "no claim": None,
    "two frames": None,
    "skippable frame": b"\x50\x2a\x4d\x18\x00\x10\x00\x00" + bytes(4096),
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
@pytest.mark.parametrize("codec", sorted(ZSTD_PREFIX))
def test_a_decompression_bomb_takes_no_memory(codec, bomb):
    """What compressed data claims or would become is checked against the layout before anything is allocated."""
    size = {"zstd": 4, "half": 2, "int8": 1, "int4": 1}[codec] * LAYOUT.size
    payload = BOMBS[bomb]
    if bomb == "no claim":
        compressor = zstd.ZstdCompressor()
        payload = compressor.compress(bytes(50_000_000)) + compressor.flush()
    if bomb == "two frames":
        payload = zstd.compress(bytes(size)) + zstd.compress(bytes(50_000_000))
    data = sealed(codec, ZSTD_PREFIX[codec] + payload)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(data, LAYOUTS)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", sorted(ZSTD_PREFIX))
def test_an_honest_frame_passes(codec):
    """The bombs are refused for what they are, not for how they are wrapped."""
    size = {"zstd": 4, "half": 2, "int8": 1, "int4": 1}[codec] * LAYOUT.size
    assert not decode(sealed(codec, ZSTD_PREFIX[codec] + zstd.compress(bytes(size))), LAYOUTS)["delta"].vector().any()


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("payload", [b"", b"\0", b"\xff" * 8, b"\xff\xff\xff\xff\x0f" + bytes(50), bytes(200)])
def test_short_payloads_made_by_hand(codec, payload):
    """Nothing, zeros, and counts far beyond the layout, for a model and for one without elements."""
    for layouts in (LAYOUTS, {"delta": Layout((), ())}, {"delta": Layout(("e",), ((0,),))}):
        data = pack(Header(codec=codec_class(codec).number or codec), layouts, [[payload]])
        try:
            update = decode(data, layouts)["delta"]
        except CodecError:
            continue
        assert np.isfinite(update.vector()).all()
        assert update.vector().shape == (layouts["delta"].size,)


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        ("topk", b"\x02" + bytes(8) + b"\x07" + b"\0"),  # positions that do not end
        ("topk", b"\x80\x05" + bytes(2560 + 1)),  # 640 of 620
        ("topk", b"\x01" + bytes(4) + b"\x20" + bytes(5)),  # a width beyond the layout
        ("stc", b"\x03" + bytes(4) + b"\xff" + bytes(9)),  # signs behind the last
        ("stc", b"\0"),  # none, in more than no bytes
        ("randomk", bytes(4) + b"\x02\x01" + bytes(4)),  # an unknown type of values
        ("randomk", bytes(4) + b"\0\x01" + b"\0\0\x80\x7f"),  # infinite
        ("sign", b"\0\0\xc0\x7f" + bytes(4 + 78)),  # a scale that is no number
        ("sign", bytes(8 + 77) + b"\x01"),  # a bit behind the last
        ("eden", bytes(4) + b"\0\0\x80\x7f" * 4 + bytes(80)),  # infinite
        ("powersgd", b"\0"),  # no rank
        ("powersgd", b"\x21" + bytes(5000)),  # a rank beyond the largest
        ("half", b"\x7f\0" + zstd.compress(b"\xff" * 620 + b"\x7b" * 620)),  # beyond float32
        ("half", bytes(2) + zstd.compress(b"\x01" * 620 + b"\x7c" * 620)),  # signalling NaN
        ("int8", b"\xff\xff\x7f\x7f" * 2 + b"\0" + zstd.compress(b"\xfe" * 620)),  # beyond float32
        ("int8", bytes(8) + b"\0" + zstd.compress(b"\xff" * 620)),  # a symbol beyond the levels
        ("int4", bytes(8) + b"\0" + zstd.compress(b"\x0f" * 620)),  # a symbol beyond the levels
        ("int8", bytes(8) + b"\x09" + bytes(300)),  # an unknown coder
        ("int8", bytes(8) + b"\x01" + bytes(255)),  # a table without symbols
        ("int8", bytes(8) + b"\x01" + b"\xff" * 255 + bytes(4)),  # huge weights, no stream
    ],
)
def test_each_check_of_a_decoder_holds(codec, payload):
    """Hand-made payloads, each wrong in one way."""
    with pytest.raises(CodecError):
        decode(sealed(codec, payload), LAYOUTS)


def test_the_work_for_a_hostile_count_is_bounded_by_the_layout():
    """A million announced values of a layout of six hundred cost nothing."""
    honest = encode(CodecSpec("topk"), {"delta": np.ones(620, np.float32)}, LAYOUTS).data
    assert decode(honest, LAYOUTS)
    with pytest.raises(CodecError, match="above its limit of 620"):
        decode(sealed("topk", b"\xc0\x84\x3d" + bytes(9000)), LAYOUTS)
