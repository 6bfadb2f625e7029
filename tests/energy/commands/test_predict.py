"""``edge-energy predict`` as a user reads it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from energy import cli
from energy.thor.profile import Whole, save_profile
from tests.energy.synthetic_layers import cost, draw, profile

DIGITS = Path(__file__).parents[3] / "examples" / "digits.bundle"


@pytest.fixture
def path(tmp_path):
    """A profile that knows dense layers, with a factor that two anchors set."""
    rows = [
        {name: size[name] for name in ("batch", "in_channels", "out_channels")}
        for size in draw(np.random.default_rng(0), 12)
    ]
    made = profile(rows, [cost({**row, "in_positions": 1, "out_positions": 1}) for row in rows], kind="linear")
    wholes = [
        Whole(model=name, quantity="joules", batch=32, measured=1.04, predicted=1.0, low=0.9, high=1.1, anchor=True)
        for name in ("one", "two")
    ]
    save_profile(msgspec.structs.replace(made, factor={"joules": 1.04}, wholes=wholes), tmp_path / "profile.json")
    return tmp_path / "profile.json"


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def test_text_says_what_the_prediction_holds_for(path, capsys):
    """Device, batch, threads and factor stand in the first line; figures have units with prefixes."""
    assert predict(path, DIGITS, "--batch", 16, "--allow-missing") == 0
    first, _, figures, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("on bench, batch 16, 1 thread, factor 1.04 by 2 anchors")
    assert figures.startswith("joules: ")
    assert " mJ, 90 % interval " in figures


def test_json_says_what_the_prediction_holds_for(path, capsys):
    """The same as keys."""
    assert predict(path, DIGITS, "--batch", 16, "--allow-missing", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["threads"], found["interval"]) == (16, 1, 0.9)
    assert (found["steps"][0]["factor"], found["steps"][0]["anchors"]) == (1.04, 2)


def test_a_quantity_that_was_not_measured_is_refused_by_those_that_were(path, capsys):
    """No fit would help, so none is advised."""
    assert predict(path, DIGITS, "--quantity", "cpu_seconds") == 2
    said = capsys.readouterr().err
    assert "has no cpu_seconds, but joules" in said
    assert "edge-energy fit" not in said


def test_unknown_kinds_can_be_left_out(path, capsys):
    """The message names the option for it."""
    assert predict(path, DIGITS) == 1
    assert "--allow-missing" in capsys.readouterr().err


def test_what_is_no_bundle_is_said_in_words(path, tmp_path, capsys):
    """Names of Python's errors and codecs are nothing to a user."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_bytes(b'\xff\xfe"')
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    (tmp_path / "lacks").mkdir()
    (tmp_path / "lacks" / "manifest.json").write_text('{"layers": [{"settings": {}}]}')
    for name in ("bad", "other.zip", "lacks"):
        assert predict(path, tmp_path / name) == 1
        said = capsys.readouterr().err
        assert name in said
        assert len(said.splitlines()) == 1
        assert not any(word in said for word in ("Error", "codec", "NoneType"))
