"""What a job sees of a dataset: hold-out by identity, windows, preprocessing, and clear refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import manifest as m
from edge_runtime.data.holdout import held_out, keys_of_content, keys_of_ids, keys_of_rows
from edge_runtime.data.npz import NpzSnapshot
from edge_runtime.data.view import View, Window
from edge_runtime.errors import BundleError, DataError
from tests.edge_runtime import toy_bundle

MANIFEST = toy_bundle.manifest(toy_bundle.files())
RNG = np.random.default_rng(3)
X = RNG.normal(size=(500, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 500)
KEYS = (9407870976149377255, 17450965218456887116, 10411433741863221176)


def view(x=X, y=Y, *, times=None, ids=None, manifest=MANIFEST, now=0.0, **window):
    return View("d", NpzSnapshot(x, y, times, ids), manifest, Window(**window), now_unix_s=now)


def read(seen, rows, dtype=np.float32):
    x, y = np.zeros((len(rows), *X.shape[1:]), dtype), np.zeros(len(rows), np.int64)
    seen.read(np.asarray(rows), x, y)
    return x, y


def changed(**fields):
    values = {"name": "x", "dtype": "float32", "shape": (4,), **fields}
    return toy_bundle.manifest(toy_bundle.files(), inputs=[m.Input(**values)])


def test_without_hold_out_all_samples_train():
    """Nothing is hashed or held back unless asked."""
    seen = view()
    np.testing.assert_array_equal(seen.train, np.arange(500))
    assert len(seen.holdout) == 0


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_hold_out_takes_about_its_fraction_and_nothing_twice(fraction):
    """Training and hold-out are apart and together all."""
    seen = view(holdout_fraction=fraction)
    assert abs(len(seen.holdout) / 500 - fraction) < 0.1
    np.testing.assert_array_equal(np.sort(np.concatenate([seen.train, seen.holdout])), np.arange(500))


def test_a_sample_stays_on_its_side_when_data_is_shuffled_or_grows():
    """Membership follows the content, or the id, never the place."""
    held = {X[row].tobytes() for row in view(holdout_fraction=0.3).holdout}
    order = RNG.permutation(500)[:300]
    seen = view(X[order], Y[order], holdout_fraction=0.3)
    assert {X[order][row].tobytes() for row in seen.holdout} <= held
    assert not {X[order][row].tobytes() for row in seen.train} & held
    ids = np.arange(500)
    by_id = set(ids[view(ids=ids, holdout_fraction=0.3).holdout])
    assert set(order[view(X[order] + 1, Y[order], ids=order, holdout_fraction=0.3).holdout]) <= by_id


def test_keys_are_stable_over_releases():
    """These values decide what was never trained on; they must not change."""
    assert keys_of_ids([7, "seven", b"7"]).tolist() == keys_of_ids(["7", b"seven", 7]).tolist()
    assert keys_of_ids([7])[0] == KEYS[0]
    assert keys_of_rows("_000", 3, 4)[0] == KEYS[1]
    assert keys_of_content(np.arange(4, dtype=np.uint8).reshape(1, 4), np.array([1], np.uint8))[0] == KEYS[2]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_row_keys_do_not_depend_on_how_they_are_asked(first, second, third):
    """Any split of the range gives the same keys."""
    start, middle, stop = sorted([first, second, third])
    parts = np.concatenate([keys_of_rows("s", start, middle), keys_of_rows("s", middle, stop)])
    np.testing.assert_array_equal(parts, keys_of_rows("s", start, stop))


def test_a_larger_fraction_holds_out_the_same_samples_and_more():
    """Runs with different fractions do not train on each other's hold-out of the smaller one."""
    keys = keys_of_rows("s", 0, 2000)
    assert not (held_out(keys, 0.1) & ~held_out(keys, 0.2)).any()
    assert not held_out(keys, 0.0).any()


def test_windows_take_the_newest():
    """By place where there are no times, by time where there are."""
    np.testing.assert_array_equal(view(max_samples=3).train, [497, 498, 499])
    times = np.array([5.0, 1, 9, 3, 7])
    few = {"x": X[:5], "y": Y[:5], "times": times}
    np.testing.assert_array_equal(view(**few, max_samples=2).train, [2, 4])
    np.testing.assert_array_equal(view(**few, max_age_s=5, now=10).train, [0, 2, 4])
    np.testing.assert_array_equal(view(**few, max_age_s=5, max_samples=1, now=10).train, [2])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"x": X[:0], "y": Y[:0]}, "dataset 'd' is empty"),
        ({"x": X[:, :3]}, r"x has samples of shape \(3,\), the bundle expects \(4,\); reshape"),
        ({"y": Y[:, None]}, r"y has samples of shape \(1,\), the bundle expects \(\)"),
        ({"y": Y.astype(np.float32)}, "y has type float32, the bundle expects int64; store whole numbers"),
        ({"x": X.astype("U8")}, "x has type <U8, the bundle expects float32; store numbers"),
        ({"y": np.where(np.arange(500) == 77, 3, Y)}, "label 3 of sample 77 is out of range.*classes 0 to 2"),
        ({"y": np.where(np.arange(500) == 400, -1, Y)}, "label -1 of sample 400 is out of range"),
        ({"max_age_s": 5.0}, "has no sample times, but the job asks for max_age_s"),
        ({"times": np.zeros(500), "max_age_s": 5.0, "now": 10.0}, "none of 500 samples is younger than 5 s"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_the_cure(arguments, reason):
    """The message names the dataset, what was found, and what the bundle expects."""
    with pytest.raises(DataError, match=reason):
        view(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values_are_found_as_they_are_used(value):
    """The first bad sample is named by its row."""
    bad = X.copy()
    bad[321, 2] = value
    seen = view(bad)
    read(seen, [1, 2, 3])
    with pytest.raises(DataError, match="x of sample 321 is NaN or infinite"):
        read(seen, [5, 321, 7])


def test_values_too_large_for_float32_are_bad_values():
    """A float64 that overflows is found, not trained on."""
    with pytest.raises(DataError, match="x of sample 0 is NaN or infinite, or becomes so"):
        read(view(np.full((5, 4), 1e300), Y[:5]), [0])


def test_bad_targets_are_found_too():
    """Regression targets are checked like inputs."""
    target = m.Input(name="y", dtype="float32", shape=())
    task = m.Task(loss="mean_squared_error")
    manifest = toy_bundle.manifest(toy_bundle.files(), target=target, task=task)
    y = Y.astype(np.float32)
    y[9] = np.nan
    seen = view(y=y, manifest=manifest)
    with pytest.raises(DataError, match="y of sample 9 is NaN"):
        seen.read(np.array([8, 9]), np.zeros((2, 4), np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float64, np.bool_])
def test_stored_types_are_cast(dtype):
    """Data may be stored as small as it is."""
    stored = (np.abs(X) * 10).astype(dtype)
    x, y = read(view(stored), [0, 4])
    np.testing.assert_array_equal(x, stored[[0, 4]].astype(np.float32))
    np.testing.assert_array_equal(y, Y[[0, 4]])


def test_preprocessing_is_applied_as_the_manifest_says():
    """``(v * scale - mean) / std``, per channel where given, one step after the other."""
    images = RNG.integers(0, 256, (6, 3, 5, 5)).astype(np.uint8)
    steps = [m.Preprocessing(scale=1 / 255, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]), m.Preprocessing(mean=[1.0])]
    manifest = changed(shape=(3, 5, 5), preprocessing=steps)
    seen = View("d", NpzSnapshot(images, Y[:6], None, None), manifest, Window())
    out = np.zeros((6, 3, 5, 5), np.float32)
    seen.read(np.arange(6), out, np.zeros(6, np.int64))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (steps[0].mean, steps[0].std))
    np.testing.assert_allclose(out, (images / 255 - mean) / std - 1, atol=1e-5)


@pytest.mark.parametrize(
    "step", [m.Preprocessing(mean=[1.0, 2.0]), m.Preprocessing(std=[0.0]), m.Preprocessing(scale=float("nan"))]
)
def test_preprocessing_that_cannot_be_applied_is_the_bundles_fault(step):
    """A manifest with a zero deviation or a wrong number of channels is refused."""
    with pytest.raises(BundleError, match="preprocessing of 'x'"):
        view(manifest=changed(preprocessing=[step]))


def test_a_users_class_that_raises_is_a_data_error():
    """The user's own code cannot bring the worker down without a word."""

    class Broken(NpzSnapshot):
        def batch(self, _indices):
            raise OSError("camera unplugged")

    with pytest.raises(DataError, match="reading failed: OSError: camera unplugged"):
        View("d", Broken(X, Y, None, None), MANIFEST, Window())
