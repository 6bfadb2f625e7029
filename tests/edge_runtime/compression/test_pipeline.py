"""The pipeline around the codecs: buffers, transforms, state, third-party codecs, and what is refused."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from edge_runtime.compression import Codec, Layout, Update, codec_names, registry
from edge_runtime.compression.base import Encoded
from edge_runtime.compression.pipeline import (
    CodecSpec,
    check_spec,
    decode,
    decode_model,
    encode,
    encode_model,
    give_back,
    keeps_residual,
)
from edge_runtime.errors import CodecError

LAYOUT = Layout(("w", "mean", "b"), ((4, 3), (2,), (3,)), frozenset({"mean"}))
LAYOUTS = {"delta": LAYOUT}
VECTOR = np.linspace(-2, 2, 17, dtype=np.float32)


class Broken(Codec):
    """A third-party codec that decodes to whatever ``result`` is, or raises it."""

    name = "broken"
    result = None

    def encode(self, values, layout, state, request):  # noqa: ARG002
        return Encoded(b"\1", Update(values), state)

    def decode(self, payload, layout):  # noqa: ARG002
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class Counter(Codec):
    """A third-party codec with state and an option: multiplies by how often it was called."""

    name = "counter"
    defaults = {"step": 1}  # noqa: RUF012
    feedback = False

    def init(self, layout):  # noqa: ARG002
        return {"count": np.zeros(1, np.int64)}

    def encode(self, values, layout, state, request):  # noqa: ARG002
        count = state["count"] + self.options["step"]
        return Encoded(
            bytes([int(count[0])]) + values.tobytes(), Update(values * np.float32(count[0])), {"count": count}
        )

    def decode(self, payload, layout):  # noqa: ARG002
        return Update(np.frombuffer(payload[1:], "<f4") * np.float32(payload[0]))


@pytest.fixture
def packages(monkeypatch):
    """Codecs as installed packages offer them."""
    found = {"counter": Counter, "broken": Broken}
    entries = {name: EntryPoint(name, f"somewhere:{cls.__name__}", registry.GROUP) for name, cls in found.items()}
    entries["missing"] = EntryPoint("missing", "no_such_module:Codec", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)
    monkeypatch.setattr(registry, "_loaded", dict(found))


@pytest.mark.usefixtures("packages")
def test_a_packages_codec_travels_by_name_and_keeps_its_state():
    """State goes in and out explicitly, so rounds can be interrupted between any two."""
    assert "counter" in codec_names()
    spec = CodecSpec("counter", {"step": 2})
    first = encode(spec, {"delta": VECTOR}, LAYOUTS)
    assert b"counter" in first.data
    second = encode(spec, {"delta": VECTOR}, LAYOUTS, first.state)
    assert encode(spec, {"delta": VECTOR}, LAYOUTS, first.state).data == second.data
    trained = [*range(12), *range(14, 17)]
    np.testing.assert_array_equal(decode(first.data, LAYOUTS)["delta"].vector()[trained], VECTOR[trained] * 2)
    np.testing.assert_array_equal(decode(second.data, LAYOUTS)["delta"].vector()[trained], VECTOR[trained] * 4)


def test_a_codec_that_is_not_installed_is_named(monkeypatch):
    """The receiver of an update says which codec it lacks, and what it has."""
    monkeypatch.setattr(registry, "_loaded", {"counter": Counter})
    data = encode(CodecSpec("counter"), {"delta": VECTOR}, LAYOUTS).data
    monkeypatch.setattr(registry, "_loaded", {})
    with pytest.raises(CodecError, match=r"codec 'counter' is unknown here; known: .*raw.*zstd"):
        decode(data, LAYOUTS)


@pytest.mark.usefixtures("packages")
def test_a_codec_that_cannot_be_imported_is_named():
    """A broken installation is told from a misspelt name."""
    with pytest.raises(CodecError, match="'missing' cannot be imported from no_such_module:Codec"):
        check_spec(CodecSpec("missing"))
    with pytest.raises(CodecError, match="'best' is unknown here; known: broken, counter"):
        check_spec(CodecSpec("best"))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "result",
    [
        ValueError("v"),
        KeyError("k"),
        IndexError("i"),
        OverflowError("o"),
        TypeError("t"),
        MemoryError(),
        Update(np.zeros(14, np.float32)),
        Update(np.zeros((15, 1), np.float32)),
        Update(np.zeros(15)),
        Update(np.full(15, np.nan, np.float32)),
        Update(np.array([1, np.inf], np.float32), np.array([3, 4]), 15),
        Update(np.zeros(2, np.float32), np.array([3, 4]), 16),
        Update(np.zeros(3, np.float32), np.array([3, 4]), 15),
    ],
    ids=lambda result: type(result).__name__,
)
def test_a_faulty_codec_gives_a_codec_error(monkeypatch, result):
    """Whatever a codec raises or returns, the receiver goes on with the next update."""
    data = encode(CodecSpec("broken"), {"delta": VECTOR}, LAYOUTS).data
    monkeypatch.setattr(Broken, "result", result)
    with pytest.raises(CodecError, match="'delta'"):
        decode(data, LAYOUTS)


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        ({"other": VECTOR}, r"channels \['other'\] given, expected \['delta'\]"),
        ({"delta": VECTOR, "more": VECTOR}, "channels"),
        ({"delta": VECTOR[:3]}, r"expected float32 \(17,\)"),
        ({"delta": VECTOR.reshape(1, 17)}, "expected float32"),
        ({"delta": VECTOR.astype(np.float64)}, "expected float32"),
    ],
)
def test_wrong_input_is_refused(vectors, reason):
    """The sender finds its own mistakes."""
    with pytest.raises(CodecError, match=reason):
        encode(CodecSpec("raw"), vectors, LAYOUTS)


def test_lossless_codecs_take_no_options_of_lossy_ones():
    """Error feedback of nothing is a mistake in the plan."""
    for options in ({"error_feedback": True}, {"clip_norm": 1.0}, {"momentum": 0.5}):
        with pytest.raises(CodecError, match="loses nothing"):
            check_spec(CodecSpec("zstd", options))


def test_buffers_beyond_float16_keep_their_size_and_their_rest():
    """Variances of unnormalised images take no more bytes than others, and what rounding leaves is sent later."""
    vector, small = VECTOR.copy(), VECTOR.copy()
    vector[12:14], small[12:14] = (1_000_003, 70_000), (1, 3)
    first = encode(CodecSpec("sign"), {"delta": vector}, LAYOUTS)
    assert len(first.data) == len(encode(CodecSpec("sign"), {"delta": small}, LAYOUTS).data)
    second = encode(CodecSpec("sign"), {"delta": np.zeros_like(vector)}, LAYOUTS, first.state)
    sums = [decode(part.data, LAYOUTS)["delta"].vector()[12:14] for part in (first, second)]
    np.testing.assert_allclose(sums[0], [1_000_003, 70_000], rtol=2.0**-10)
    np.testing.assert_array_equal(sums[0] + sums[1], np.array([1_000_003, 70_000], np.float32))


def test_feedback_covers_the_rounding_of_buffers():
    """What float16 drops of a running mean is sent in later rounds."""
    total, state = np.zeros(2), None
    vector = np.zeros(17, np.float32)
    vector[12:14] = 1.0001, -0.3333
    for _ in range(50):
        encoded = encode(CodecSpec("topk"), {"delta": vector}, LAYOUTS, state)
        total += encoded.updates["delta"].vector()[12:14]
        state = encoded.state
    np.testing.assert_allclose(total, 50 * vector[12:14].astype(np.float64), atol=1e-3)


def test_a_refused_update_is_sent_again():
    """What the coordinator did not count goes back into the residual, buffers included."""
    spec = CodecSpec("topk", {"density": 0.2})
    refused = encode(spec, {"delta": VECTOR}, LAYOUTS)
    state = give_back(spec, refused.updates, LAYOUTS, refused.state)
    np.testing.assert_allclose(state["delta.feedback.residual"], np.delete(VECTOR, [12, 13]), atol=1e-6)
    np.testing.assert_allclose(state["delta.buffers.residual"], VECTOR[12:14], atol=1e-6)
    again = encode(spec, {"delta": np.zeros(17, np.float32)}, LAYOUTS, state)
    np.testing.assert_array_equal(again.updates["delta"].vector(), refused.updates["delta"].vector())


def test_without_feedback_a_refused_update_is_gone():
    """A codec that keeps no residual has nowhere to put it."""
    spec = CodecSpec("topk", {"error_feedback": False})
    refused = encode(spec, {"delta": VECTOR}, LAYOUTS)
    assert give_back(spec, refused.updates, LAYOUTS, refused.state) == refused.state == {}
    assert keeps_residual(CodecSpec("topk"))
    assert not keeps_residual(spec)
    assert not keeps_residual(CodecSpec("raw"))


def test_random_k_is_unbiased_or_has_feedback():
    """The two do not go together: the residual of values that were scaled up grows without end."""
    assert keeps_residual(CodecSpec("randomk"))
    assert not keeps_residual(CodecSpec("randomk", {"unbiased": True}))


def test_clipping_acts_before_the_codec():
    """The receiver's limit on the norm is kept by an honest sender."""
    spec = CodecSpec("int8", {"clip_norm": 0.5, "error_feedback": False})
    layout = Layout(("w",), ((100,),))
    vector = np.linspace(-3, 3, 100, dtype=np.float32)
    data = encode(spec, {"delta": vector}, {"delta": layout}).data
    assert decode(data, {"delta": layout}, max_norm=0.55)


def test_a_budget_is_shared_by_the_channels():
    """Each gets its part by size, and the whole is within the budget."""
    layouts = {"delta": Layout(("w",), ((3000,),)), "control": Layout(("w",), ((1000,),))}
    dice = np.random.default_rng(0)
    vectors = {name: dice.normal(size=layout.size).astype(np.float32) for name, layout in layouts.items()}
    encoded = encode(CodecSpec("topk"), vectors, layouts, budget_bytes=1500)
    assert 1350 <= len(encoded.data) <= 1500
    counts = {name: len(update.values) for name, update in encoded.updates.items()}
    assert 2 * counts["control"] < counts["delta"] < 4 * counts["control"]


def test_codecs_without_rate_control_refuse_a_budget_they_exceed():
    """More than was allowed is never sent."""
    with pytest.raises(CodecError, match="bytes with codec 'sign', but 20 are allowed; choose a stronger codec"):
        encode(CodecSpec("sign"), {"delta": VECTOR}, LAYOUTS, budget_bytes=20)
    assert encode(CodecSpec("sign"), {"delta": VECTOR}, LAYOUTS, budget_bytes=100)


def test_a_model_is_stored_exactly():
    """A model version is the exact values, so that its hash stands for them."""
    layout = Layout(("w", "n"), ((10,), (1,)), frozenset({"n"}))
    vector = np.append(np.random.default_rng(0).normal(size=10), -0.0).astype(np.float32)
    data = encode_model(vector, layout)
    np.testing.assert_array_equal(decode_model(data, layout).view("u4"), vector.view("u4"))
    assert encode_model(vector, layout) == data


def test_a_large_raw_model_decodes_in_place():
    """No second copy of the model is made."""
    layout = Layout(("w",), ((1_200_000,),))
    vector = np.random.default_rng(0).normal(size=1_200_000).astype(np.float32)
    data = encode_model(vector, layout)
    decoded = decode_model(data, layout)
    assert len(data) < vector.nbytes + 100
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))
    assert decoded.flags.aligned


def test_sparse_updates_add_without_a_dense_copy():
    """The sum of weighted updates is the same, sparse or dense."""
    sparse = Update(np.array([1.5, -2], np.float32), np.array([3, 1]), 5)
    dense = Update(sparse.vector())
    assert sparse.vector().tolist() == [0, -2, 0, 1.5, 0]
    totals = [np.ones(5), np.ones(5)]
    sparse.add_to(totals[0], 0.1)
    dense.add_to(totals[1], 0.1)
    np.testing.assert_array_equal(*totals)
    assert sparse.norm() == dense.norm() == 2.5
    np.testing.assert_array_equal(sparse.subtracted_from(np.ones(5, np.float32)), 1 - dense.values)
    large = Update(np.ones(200_000, np.float32))
    total = np.zeros(200_000)
    large.add_to(total, 0.5)
    assert (total == 0.5).all()


def test_names_import_nothing_heavy():
    """The daemon announces its codecs without numpy."""
    code = (
        "import sys, edge_runtime.compression as c\n"
        "assert 'raw' in c.codec_names()\n"
        "bad = {'numpy', 'onnxruntime', 'backports.zstd', 'safetensors'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
