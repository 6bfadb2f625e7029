"""Evaluation and export of models, against the graphs of a real (small) bundle."""

from __future__ import annotations

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy

from coordinator.errors import ModelError
from coordinator.evaluation import TestSet, evaluate_blob
from coordinator.evaluation_numbers import accuracy, mean_loss
from coordinator.model_export import write_model
from edge_runtime.bundle import Bundle
from edge_runtime.errors import BundleError, ConfigError, DataError
from edge_runtime.messages import BlobRef
from edge_runtime.store.blobs import BlobStore
from tests.edge_runtime import toy_bundle


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(toy_bundle.write_bundle(tmp_path / "toy.bundle"))


@pytest.fixture
def data(tmp_path):
    return toy_bundle.write_data(tmp_path / "test.npz", samples=301)


@pytest.fixture
def vector(bundle):
    return np.random.default_rng(0).normal(size=bundle.layout().size).astype(np.float32)


def expected(bundle, vector, data):
    """Loss and accuracy of the toy, softmax regression, in NumPy."""
    tensors, arrays = bundle.layout().split(vector), np.load(data)
    logits = arrays["x"].astype(np.float64) @ tensors["w"] + tensors["b"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(logits)), arrays["y"]].sum(), int((logits.argmax(1) == arrays["y"]).sum()), logits


@pytest.mark.parametrize("batch", [7, 256])
def test_evaluation_gives_exact_sums(bundle, vector, data, batch):
    """The last, partial batch counts as much as it holds."""
    loss_sum, correct, _ = expected(bundle, vector, data)
    result = TestSet(data, bundle).evaluate(vector, batch)
    assert (result.samples, result.correct) == (301, correct)
    assert result.loss_sum == pytest.approx(loss_sum, rel=1e-5)
    assert accuracy(result) == correct / 301
    assert mean_loss(result) == result.loss_sum / 301


def test_test_sets_that_do_not_fit_are_told(tmp_path, bundle):
    """Missing file, missing array, wrong shape: one clear line each."""
    with pytest.raises(DataError, match="does not exist"):
        TestSet(tmp_path / "no.npz", bundle)
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4)))
    with pytest.raises(DataError, match="no array 'y'"):
        TestSet(tmp_path / "a.npz", bundle)
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 9)), y=np.zeros(3, np.int64))
    with pytest.raises(DataError, match="shape"):
        TestSet(tmp_path / "b.npz", bundle)


def test_stored_models_are_evaluated(tmp_path, bundle, vector, data):
    """From blobs, as the server does; a missing one is named."""
    from edge_runtime.compression.pipeline import encode_model

    blobs = BlobStore(tmp_path / "blobs")

    def reference(stored):
        return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)

    test_set = reference(blobs.put_file(data))
    model = reference(blobs.put(encode_model(vector, bundle.layout())))
    assert evaluate_blob(blobs, bundle, test_set, model).correct == expected(bundle, vector, data)[1]
    blobs.delete(model.sha256)
    with pytest.raises(ModelError, match=r"model .* is not in the store"):
        evaluate_blob(blobs, bundle, test_set, model)


def test_exported_onnx_predicts_with_stock_onnxruntime(tmp_path, bundle, vector, data):
    """One file, one input, the trained weights inside; labels and preprocessing in its metadata."""
    path = tmp_path / "out.onnx"
    write_model(bundle, vector, path)
    session = ort.InferenceSession(str(path))
    assert [entry.name for entry in session.get_inputs()] == ["x"]
    (output,) = session.run(["output"], {"x": np.load(data)["x"]})
    np.testing.assert_allclose(output, expected(bundle, vector, data)[2], rtol=1e-4, atol=1e-5)
    notes = session.get_modelmeta().custom_metadata_map
    assert notes["bundle"] == "toy"
    assert msgspec.json.decode(notes["preprocessing"]) == {"x": []}


def test_exported_safetensors_hold_all_tensors(tmp_path, bundle, vector):
    """Trained ones with their new values, frozen ones as they are."""
    path = tmp_path / "out.safetensors"
    write_model(bundle, vector, path)
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(tensors["w"], bundle.layout().split(vector)["w"])
    np.testing.assert_array_equal(tensors["frozen"], toy_bundle.tensors()["frozen"])
    assert tensors["count"].dtype == np.int64


def test_other_formats_are_refused_before_any_work(tmp_path, bundle, vector):
    """The message lists the formats there are."""
    with pytest.raises(ConfigError, match=r"'\.pt' names no format; take one of \.onnx, \.safetensors"):
        write_model(bundle, vector, tmp_path / "out.pt")
    with pytest.raises(ConfigError, match="folder does not exist"):
        write_model(bundle, vector, tmp_path / "no" / "out.onnx")


def test_a_bundle_without_the_graph_is_told(tmp_path, vector):
    """Export needs the predict graph."""
    content = toy_bundle.files()
    manifest = toy_bundle.manifest(content)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "predict"}
    bundle = Bundle.open(toy_bundle.write_bundle(tmp_path / "x.bundle", graphs=graphs))
    with pytest.raises(BundleError, match="no graph 'predict'"):
        write_model(bundle, vector, tmp_path / "out.onnx")
