"""The container: what is bound to what, and what is refused before a codec sees a byte."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout
from edge_runtime.compression.container import (
    FORMAT_VERSION,
    LARGEST_VERSION,
    Header,
    fingerprint,
    header_bytes,
    pack,
    read_varint,
    size_limit,
    unpack,
    update_tag,
    varint,
)
from edge_runtime.errors import CodecError

LAYOUT = Layout(("w", "b"), ((4, 3), (3,)))
ONE = {"delta": LAYOUT}
TWO = {"delta": LAYOUT, "control": Layout(("c",), ((7,),))}


def sealed(body):
    """The bytes with a right CRC."""
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


@pytest.mark.parametrize("codec", [1, 3, 255, "raw", "other-codec", "ü" * 32])
@pytest.mark.parametrize("alignment", [1, 2, 4])
@pytest.mark.parametrize("layouts", [ONE, TWO])
def test_what_was_packed_is_found_again(codec, alignment, layouts):
    """Codec by number or by name, tag, version and sections return; the first section is where it was wanted."""
    header = Header(codec=codec, tag=0xDEADBEEF, base_version=300)
    sections = [[b"ab", memoryview(b"cde")], [b"fghi"]][: len(layouts)]
    data = pack(header, layouts, sections, alignment)
    found, where = unpack(data, layouts)
    assert found == header
    assert list(where) == sorted(layouts)
    assert [data[start:end] for start, end in where.values()] == [b"abcde", b"fghi"][: len(layouts)]
    assert min(start for start, _ in where.values()) % alignment == 0
    assert len(data) <= header_bytes(header, len(layouts)) + 9 + alignment - 1


def test_the_header_of_an_update_is_small():
    """One channel of a built-in codec costs 17 bytes."""
    assert len(pack(Header(codec=3, tag=1, base_version=5), ONE, [[b""]])) == 17


@pytest.mark.parametrize("version", [0, 1, 127, 128, 2**32, LARGEST_VERSION])
def test_any_model_version_travels(version):
    """A run may go on for as long as it likes."""
    assert unpack(pack(Header(codec=1, base_version=version), ONE, [[b"x"]]), ONE)[0].base_version == version


@pytest.mark.parametrize("version", [-1, LARGEST_VERSION + 1])
def test_an_impossible_model_version_is_not_written(version):
    """What no receiver reads is refused at the sender."""
    with pytest.raises(CodecError, match="limits"):
        pack(Header(codec=1, base_version=version), ONE, [[b""]])


def test_codec_names_that_do_not_fit_are_not_written():
    """A package's codec needs a name of 1 to 64 bytes."""
    for name in ("", "n" * 65, "ü" * 33):
        with pytest.raises(CodecError, match="codec name"):
            pack(Header(codec=name), ONE, [[b""]])


def test_more_channels_than_the_format_holds_are_not_written():
    """Sixteen channels are the most."""
    layouts = {f"c{number:02}": LAYOUT for number in range(17)}
    with pytest.raises(CodecError, match="17 channels"):
        pack(Header(codec=1), layouts, [[b""]] * 17)
    layouts.popitem()
    assert len(unpack(pack(Header(codec=1), layouts, [[b"z"]] * 16), layouts)[1]) == 16


def test_the_fingerprint_sees_every_difference():
    """Names, shapes, buffers, channels and their number all count."""
    variants = [
        {"delta": LAYOUT},
        {"model": LAYOUT},
        {"delta": Layout(("w", "c"), LAYOUT.shapes)},
        {"delta": Layout(LAYOUT.names, ((3, 4), (3,)))},
        {"delta": Layout(LAYOUT.names, LAYOUT.shapes, frozenset({"b"}))},
        {"delta": Layout(("b", "w"), ((3,), (4, 3)))},
        {"delta": Layout((), ())},
        TWO,
        {"delta": TWO["control"], "control": TWO["delta"]},
    ]
    assert len({fingerprint(layouts) for layouts in variants}) == len(variants)
    assert fingerprint(TWO) == fingerprint(dict(reversed(TWO.items())))


def test_tags_of_updates_differ_and_are_never_zero():
    """Zero stands for a model."""
    tags = {update_tag(("run", "device", number)) for number in range(1000)}
    assert len(tags) == 1000
    assert 0 not in tags


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"GIF89a" + data, "bad magic"),
        (lambda data: data[:10], "too short"),
        (lambda data: data[:2] + bytes([FORMAT_VERSION + 1]) + data[3:], "format version 3 is not read"),
        (lambda data: data[:2] + bytes([1]) + data[3:], "format version 1 is not read"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "CRC"),
        (lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:], "CRC"),
        (lambda data: sealed(data[:4] + b"\0\0\0\0" + data[8:-4]), "other tensors"),
        (lambda data: data + bytes(300_000), "more than these"),
        (lambda data: sealed(data[:3] + b"\0\0" + data[4:-4]), "name of the codec is cut off"),
        (lambda data: sealed(data[:3] + b"\0\x41" + data[4:-4]), "name of the codec is cut off"),
        (lambda data: sealed(data[:3] + b"\0\2\xc3\x28" + data[4:-4]), "name of the codec is damaged"),
        (lambda data: sealed(data[:3] + b"\0\x05abcde"), "too short|cut off"),
        (lambda data: sealed(data[:12] + b"\xff" * 9 + b"\x01"), "above its limit"),
        (lambda data: sealed(data[:12] + b"\x80" * 10), "cut off or too long"),
        (lambda data: sealed(data[:12] + b"\x85\x80\x00" + data[13:-4]), "badly written"),
        (lambda data: sealed(data[:2] + bytes([FORMAT_VERSION | 0xC0]) + data[3:-4]), "padding"),
        (lambda data: sealed(data[:2] + bytes([FORMAT_VERSION | 0xC0]) + data[3:13]), "padding"),
    ],
)
def test_damaged_containers_are_refused_and_say_why(change, reason):
    """The message names what was wrong, so that an operator can tell damage from a mistake."""
    data = pack(Header(codec=1, tag=7, base_version=5), ONE, [[b"payload"]])
    assert unpack(data, ONE)
    with pytest.raises(CodecError, match=reason):
        unpack(change(data), ONE)


@pytest.mark.parametrize("length", [b"\x08", b"\xff\x7f", b"\x84\x00"])
def test_a_channels_length_is_checked(length):
    """A section can be no longer than what is there."""
    data = pack(Header(codec=1), TWO, [[b"abcd"], [b"efg"]])
    assert data[13:14] == b"\x04"
    with pytest.raises(CodecError, match=r"cut off|limit"):
        unpack(sealed(data[:13] + length + data[14:-4]), TWO)


def test_containers_for_one_channel_are_none_for_two():
    """The receiver's own channels decide."""
    data = pack(Header(codec=1), ONE, [[b"abcd"]])
    with pytest.raises(CodecError, match="other tensors"):
        unpack(data, TWO)


def test_the_size_limit_leaves_room_for_every_codec_but_not_for_floods():
    """It grows with the layout and not with what is sent."""
    assert 16 * LAYOUT.size < size_limit(ONE) < 16 * LAYOUT.size + 100_000
    assert size_limit(TWO) > size_limit(ONE)


@settings(deadline=None, derandomize=True, database=None)
@given(number=st.integers(0, 2**63), rest=st.binary(max_size=3))
def test_any_number_is_read_as_written(number, rest):
    """LEB128 round trip, with bytes behind."""
    view = memoryview(varint(number) + rest)
    assert read_varint(view, 0, len(view), 2**63) == (number, len(view) - len(rest))


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(data=st.binary(max_size=60), layouts=st.sampled_from([ONE, TWO]))
def test_any_bytes_give_an_error_or_sections_inside(data, layouts):
    """No header leads outside of the data."""
    for candidate in (
        data,
        sealed(data),
        sealed(b"EU\x02\x00" + data),
        sealed(b"EU\x02\x01" + fingerprint(layouts) + data),
    ):
        try:
            _, sections = unpack(candidate, layouts)
        except CodecError:
            continue
        assert all(0 <= start <= end <= len(candidate) - 4 for start, end in sections.values())


def test_layouts_flatten_and_split_back():
    """Tensors by name and the one vector are two views of the same numbers."""
    layout = Layout(("a", "s", "e", "b"), ((2, 3), (), (0, 5), (4,)), frozenset({"s"}))
    tensors = {"a": np.ones((2, 3)), "s": np.array(2.0), "e": np.empty((0, 5)), "b": np.arange(4.0)}
    vector = layout.flatten(tensors)
    assert vector.shape == (11,)
    for name, tensor in layout.split(vector).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    with pytest.raises(CodecError, match="tensor 'b' has shape"):
        layout.flatten(tensors | {"b": np.arange(5.0)})
    with pytest.raises(CodecError, match="vector has shape"):
        layout.split(vector[:-1])
    assert layout.only(buffers=True) == Layout(("s",), ((),))
    assert layout.only(buffers=False) == Layout(("a", "e", "b"), ((2, 3), (0, 5), (4,)))
