"""Yesterday's bytes decode to the same numbers, bit for bit, with every Python, NumPy and processor.

``golden/`` holds containers that each codec once wrote, and in ``golden.json`` the SHA-256 of the float32 values that
they stand for. They are added to and never changed: ``EDGE_GOLDEN=1`` writes those that are missing.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.compression import Layout, registry
from edge_runtime.compression.pipeline import CodecSpec, decode, encode

FOLDER = Path(__file__).parent / "golden"
HASHES = FOLDER / "golden.json"
SMALL = Layout(
    ("conv", "conv_bias", "mean", "steps", "fc1", "fc1_bias", "fc2", "fc2_bias", "none"),
    ((4, 2, 3, 3), (4,), (4,), (), (24, 20), (24,), (5, 24), (5,), (0, 3)),
    frozenset({"mean", "steps"}),
)
LAYOUTS = {
    "plain": {"delta": SMALL},
    "channels": {"delta": SMALL, "control": Layout(("c",), ((50,),))},
    "lanes": {"delta": Layout(("w",), ((200_000,),))},
}
LAYOUTS |= dict.fromkeys(("uniform", "lowrank", "sparse", "exact"), LAYOUTS["plain"])
SPECIAL = {  # what the plain cases do not reach
    "int4.lanes": {},
    "default.lanes": {"family": "uniform", "target_ratio": 100.0},
    "default.uniform": {"family": "uniform", "target_ratio": 6.0},
    "default.lowrank": {"family": "lowrank", "target_ratio": 6.0},
    "default.sparse": {"family": "sparse", "target_ratio": 12.0},
    "default.exact": {"family": "exact", "target_ratio": 0.7},
}
FILES = [f"{codec}.{case}" for codec in sorted(registry._BUILT_IN) for case in ("plain", "channels")] + list(SPECIAL)


def reference(case):
    """A model that codecs may predict from."""
    if case != "channels":
        return None
    return np.random.default_rng(1).normal(size=SMALL.size).astype(np.float32)


def write(file):
    codec, case = file.split(".")
    dice = np.random.default_rng(2)
    vectors = {
        name: (dice.standard_t(3, layout.size) * 1e-2).astype(np.float32) for name, layout in LAYOUTS[case].items()
    }
    if case == "lanes":
        vectors["delta"] = np.where(dice.random(200_000) < 0.02, dice.normal(size=200_000), 0).astype(np.float32)
    state = None
    for seed in (4, 5):  # the second round, so that residual and warm start play their part
        encoded = encode(
            CodecSpec(codec, SPECIAL.get(file, {})),
            vectors,
            LAYOUTS[case],
            state,
            seed=seed,
            base_version=300,
            tag=9,
            reference=reference(case),
        )
        state = encoded.state
    (FOLDER / f"{file}.bin").write_bytes(encoded.data)


def hashes(file):
    case = file.split(".")[1]
    updates = decode((FOLDER / f"{file}.bin").read_bytes(), LAYOUTS[case], base_version=300, reference=reference(case))
    return {
        name: hashlib.sha256(update.vector().astype("<f4").tobytes()).hexdigest() for name, update in updates.items()
    }


@pytest.mark.parametrize("file", FILES)
def test_yesterdays_bytes_give_the_same_numbers(file):
    """A receiver that is updated reads what older devices send, and never a bit differently."""
    known = json.loads(HASHES.read_text(encoding="utf-8")) if HASHES.exists() else {}
    path = FOLDER / f"{file}.bin"
    if os.environ.get("EDGE_GOLDEN") and not path.exists():
        FOLDER.mkdir(exist_ok=True)
        write(file)
        known[file] = hashes(file)
        HASHES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert path.exists(), f"no golden bytes of {file}; EDGE_GOLDEN=1 writes them"
    assert hashes(file) == known[file]


def test_all_golden_bytes_are_tested():
    """None is forgotten when a codec is renamed."""
    assert sorted(path.name for path in FOLDER.glob("*.bin")) == sorted(f"{file}.bin" for file in FILES)


def test_numbers_of_codecs_are_never_used_again():
    """The number in a container means the same codec for ever."""
    numbers = [number for number, _ in registry._BUILT_IN.values()]
    assert len(set(numbers)) == len(numbers)
    known = {
        "raw": 1,
        "zstd": 2,
        "default": 3,
        "lowrank": 4,
        "sparse": 5,
        "fedzip": 6,
        "topk": 7,
        "int8": 8,
        "int4": 9,
        "sign": 10,
        "stc": 11,
        "eden": 12,
        "randomk": 13,
        "half": 14,
        "powersgd": 15,
    }
    for name, (number, _) in registry._BUILT_IN.items():
        assert known[name] == number
        assert registry.codec_class(name).number == number
        assert registry.codec_class(number).name == name


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_plain_formats_are_written_as_they_always_were(codec):
    """Models are stored by the hash of their bytes, so the raw format may not change by a bit."""
    data = (FOLDER / f"{codec}.plain.bin").read_bytes()
    vectors = {"delta": decode(data, LAYOUTS["plain"])["delta"].vector()}
    again = encode(CodecSpec(codec), vectors, LAYOUTS["plain"], base_version=300, tag=9)
    assert codec == "zstd" or again.data == data
    assert decode(again.data, LAYOUTS["plain"])["delta"].vector().tobytes() == vectors["delta"].tobytes()
