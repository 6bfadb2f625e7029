"""Files: typed TOML and durable writes."""

from __future__ import annotations

import array
import os
from typing import Annotated, Literal

import msgspec
import pytest

from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.files import load_toml, write_durably
from edge_runtime.toml_errors import explained


class Table(msgspec.Struct, forbid_unknown_fields=True):
    rate: float
    names: list[str] = []


def test_toml_becomes_a_struct(tmp_path):
    """A TOML file of the right shape is read into its struct."""
    (tmp_path / "a.toml").write_text('rate = 1\nnames = ["x"]\n')
    assert load_toml(tmp_path / "a.toml", Table) == Table(1.0, ["x"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate = 1\nspeed = 2\n", "speed"),
        ('rate = "fast"\n', "rate is text in quotes, but must be a number"),
        ("", "rate"),
        ("rate = \n", "not valid TOML"),
        (b"rate = '\xff'\n", "not valid TOML"),
    ],
)
def test_wrong_toml_is_refused_by_name(tmp_path, text, said):
    """An unknown key, a wrong type, a missing key or no TOML at all: the error names file and key."""
    (tmp_path / "a.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"a\.toml: .*{said}"):
        load_toml(tmp_path / "a.toml", Table)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["fast", "slow"] = "fast"
    metered: Literal["auto"] | bool = "auto"
    options: dict[str, float] = {}
    path: str = ""


class Whole(msgspec.Struct, forbid_unknown_fields=True):
    part: Part = Part()
    parts: list[Part] = []
    options: dict[str, bool | int] = {}
    share: Annotated[float, msgspec.Meta(le=1.0)] = 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[part]\nmode = "fats"\n', "part.mode is 'fats', but must be 'fast' or 'slow'"),
        ('[part]\nmetered = "no"\n', "part.metered is 'no', but must be 'auto' or true or false"),
        ('[part]\noptions = { a = 1.0, rate = "0.2" }\n', "part.options.rate is text in quotes, but must be a number"),
        ('options = { deep = "x" }\n', "options.deep is text in quotes, but must be"),
        ('[[parts]]\n[[parts]]\nmode = "x"\n', "parts[1].mode is 'x', but must be 'fast' or 'slow'"),
        ("share = 5\n", "share must be a number <= 1.0"),
    ],
)
def test_wrong_values_name_their_key_and_what_is_allowed(tmp_path, text, said):
    """Words that are allowed are listed; a key in a table of any keys is named."""
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_toml(tmp_path / "a.toml", Whole)
    assert said in str(error.value)


def test_what_is_missing_is_named_with_its_place():
    """Also in files that are no TOML."""
    assert explained("Object missing required field `link`", Whole) == "the key 'link' is missing"
    assert (
        explained("Object missing required field `x` - at `$.parts[1]`", Whole)
        == "the key 'x' is missing in table 2 of [[parts]]"
    )
    assert (
        explained("Expected `object`, got `array`", Whole)
        == 'is a list, but must be an object with keys, as {"name": ...}'
    )


def test_missing_toml_is_refused(tmp_path):
    """A file that is not there is named."""
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_toml(tmp_path / "none.toml", Table)


def test_write_replaces_the_whole_file_with_its_mode(tmp_path):
    """The new content is whole, has the wanted mode, and no temporary file is left."""
    path = tmp_path / "secret"
    write_durably(path, b"old and longer")
    write_durably(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("data", [b"", array.array("d", [1.0, 2.0]), array.array("i", range(1000))])
def test_write_takes_any_buffer(tmp_path, data):
    """Views of items wider than a byte, and empty ones, are written whole."""
    write_durably(tmp_path / "a", memoryview(data))
    assert (tmp_path / "a").read_bytes() == bytes(data)


def test_full_disk_keeps_the_old_content(tmp_path, monkeypatch):
    """When the disk fills while writing, the error says so and the old file is untouched."""
    path = tmp_path / "a"
    write_durably(path, b"old")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="no space left"):
        write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
