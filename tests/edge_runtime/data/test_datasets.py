"""Local datasets: what is there is read, what grows is seen next time, what is wrong is named."""

import sys
import types
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from edge_runtime.data import DatasetConfig, base, open_dataset
from edge_runtime.errors import ConfigError, DataError
from edge_runtime.files import load_toml
from tests.edge_runtime import toy_bundle

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6, dtype=np.int64) % 3


def config(path, **more):
    return DatasetConfig(name="d", path=str(path), **more)


def shard(folder, number, rows, *, first=0, parts=("x", "y")):
    folder.mkdir(exist_ok=True)
    values = np.arange(first, first + rows)
    arrays = {"x": np.repeat(values[:, None], 4, 1).astype(np.float32), "y": values % 3, "t": values.astype(float)}
    for part in parts:
        np.save(folder / f"{part}_{number:03}.npy", arrays[part])


@pytest.fixture(params=["npz", "npy", "shards"])
def path(request, tmp_path):
    """The same six samples in every format."""
    if request.param == "npz":
        np.savez(tmp_path / "d.npz", x=X, y=Y)
        return tmp_path / "d.npz"
    folder = tmp_path / "d"
    folder.mkdir()
    if request.param == "npy":
        np.save(folder / "x.npy", X)
        np.save(folder / "y.npy", Y)
    else:
        for number, rows in enumerate([slice(0, 1), slice(1, 4), slice(4, 6)]):
            np.save(folder / f"x_{number:03}.npy", X[rows])
            np.save(folder / f"y_{number:03}.npy", Y[rows])
    return folder


def test_every_format_gives_the_same_samples(path):
    """Rows come in any order that is asked for, as copies."""
    snapshot = open_dataset(config(path)).snapshot()
    rows = np.array([5, 0, 3, 3])
    x, y = snapshot.batch(rows)
    np.testing.assert_array_equal(x, X[rows])
    np.testing.assert_array_equal(y, Y[rows])
    np.testing.assert_array_equal(snapshot.targets(rows), Y[rows])
    assert len(snapshot) == 6
    assert snapshot.times() is None
    keys = snapshot.keys(0, 6)
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == 6
    np.testing.assert_array_equal(np.concatenate([snapshot.keys(0, 2), snapshot.keys(2, 6)]), keys)


def test_unchanged_data_is_the_same_snapshot(path):
    """Nothing is read or checked again while nothing changes."""
    dataset = open_dataset(config(path))
    assert dataset.snapshot() is dataset.snapshot()


def test_new_shards_are_seen_by_the_next_snapshot_only(tmp_path):
    """A job works on what was there when it started."""
    shard(tmp_path / "d", 0, 5)
    dataset = open_dataset(config(tmp_path / "d"))
    before = dataset.snapshot()
    shard(tmp_path / "d", 1, 3, first=5)
    assert len(before) == 5
    after = dataset.snapshot()
    assert len(after) == 8
    np.testing.assert_array_equal(after.keys(0, 5), before.keys(0, 5))


def test_a_half_written_last_shard_is_left_out_and_an_earlier_one_is_an_error(tmp_path):
    """Data may be read while it is being written, but a hole in it is told."""
    folder = tmp_path / "d"
    shard(folder, 0, 5)
    shard(folder, 1, 5)
    shard(folder, 2, 5)
    dataset = open_dataset(config(folder))
    whole = (folder / "x_002.npy").read_bytes()
    for cut in (0, 5, 60, 129, len(whole) - 1):
        (folder / "x_002.npy").write_bytes(whole[:cut])
        assert len(dataset.snapshot()) == 10
    (folder / "x_002.npy").unlink()
    assert len(dataset.snapshot()) == 10
    (folder / "x_002.npy").write_bytes(whole)
    assert len(dataset.snapshot()) == 15
    (folder / "y_001.npy").unlink()
    with pytest.raises(DataError, match=r"y_001.npy is missing.*only the newest shard"):
        dataset.snapshot()


def test_only_a_half_written_shard_is_an_error(tmp_path):
    """There is nothing to train on yet, and the message says why."""
    shard(tmp_path / "d", 0, 5, parts=("x",))
    with pytest.raises(DataError, match="no complete shard yet"):
        open_dataset(config(tmp_path / "d")).snapshot()


def test_folders_larger_than_memory_are_mapped(tmp_path):
    """Reading a batch of a large sparse file touches only its rows."""
    folder = tmp_path / "d"
    folder.mkdir()
    big = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(40_000_000, 4, 64))
    big[39_999_999] = 7
    del big
    np.lib.format.open_memmap(folder / "y.npy", mode="w+", dtype=np.uint8, shape=(40_000_000,))
    snapshot = open_dataset(config(folder)).snapshot()
    assert len(snapshot) == 40_000_000
    assert snapshot.batch(np.array([39_999_999]))[0].sum() == 7 * 256


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    [
        ({"x": X}, {}, "has no array 'y'; it has x"),
        ({"x": X, "y": Y[:5]}, {}, "different lengths: {'x': 6, 'y': 5}"),
        ({"x": X, "y": Y}, {"time": "t"}, "has no array 't'"),
        ({"x": X, "y": np.array([{}] * 6)}, {}, "holds Python objects"),
    ],
)
def test_npz_files_that_do_not_fit_are_named(tmp_path, arrays, options, reason):
    """The message names the file, what was found and the cure."""
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=reason) as caught:
        open_dataset(config(tmp_path / "d.npz", **options)).snapshot()
    assert "d.npz" in str(caught.value)


def test_a_truncated_npz_says_half_written(tmp_path):
    """A file that is being written is not read as if it were whole."""
    data = toy_bundle.write_data(tmp_path / "d.npz").read_bytes()
    for length in range(1, len(data), 301):
        (tmp_path / "d.npz").write_bytes(data[:length])
        with pytest.raises(DataError, match="half-written"):
            open_dataset(config(tmp_path / "d.npz")).snapshot()


def test_a_changed_npz_is_read_again(tmp_path):
    """The next job sees what the file holds then."""
    dataset = open_dataset(config(toy_bundle.write_data(tmp_path / "d.npz", 10)))
    assert len(dataset.snapshot()) == 10
    toy_bundle.write_data(tmp_path / "d.npz", 12)
    assert len(dataset.snapshot()) == 12


def test_missing_paths_and_formats_are_named(tmp_path):
    """A wrong path in the configuration is one clear line."""
    with pytest.raises(DataError, match="does not exist; correct the path"):
        open_dataset(config(tmp_path / "none"))
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"neither a .npz file nor a folder"):
        open_dataset(config(tmp_path / "d.csv"))
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"neither x.npy nor x_\*.npy"):
        open_dataset(config(tmp_path / "e")).snapshot()


def test_shards_must_agree(tmp_path):
    """Shards of different shapes are no dataset."""
    shard(tmp_path / "d", 0, 5)
    np.save(tmp_path / "d" / "x_001.npy", np.zeros((2, 5), np.float32))
    np.save(tmp_path / "d" / "y_001.npy", np.zeros(2, np.int64))
    with pytest.raises(DataError, match="shards of 'x' differ"):
        open_dataset(config(tmp_path / "d")).snapshot()


def test_a_users_own_class_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    """Any data source with four methods works."""
    inner = open_dataset(config(toy_bundle.write_data(tmp_path / "d.npz")))
    module = types.ModuleType("my_data")
    module.make = lambda given: inner if given.options == {"port": 3} else None
    monkeypatch.setitem(__import__("sys").modules, "my_data", module)
    own = DatasetConfig(name="d", factory="my_data:make", options={"port": 3})
    assert open_dataset(own) is inner
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [EntryPoint("mine", "my_data:make", base.GROUP)])
    assert open_dataset(DatasetConfig(name="d", factory="mine", options={"port": 3})) is inner
    with pytest.raises(DataError, match="returned no dataset"):
        open_dataset(DatasetConfig(name="d", factory="my_data:make"))
    with pytest.raises(DataError, match="factory 'my_data:other' failed: AttributeError"):
        open_dataset(DatasetConfig(name="d", factory="my_data:other"))


def test_factory_is_found_beside_the_configuration(tmp_path, monkeypatch):
    """A module in the folder of agent.toml is found first; where there is none, the error names the folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = toy_bundle.write_data(tmp_path / "d.npz", 10)
    code = "from edge_runtime.data import DatasetConfig, open_dataset\n"
    code += f"def make(config):\n    return open_dataset(DatasetConfig(name='d', path={str(data)!r}))\n"
    (tmp_path / "beside_the_toml.py").write_text(code)
    own = DatasetConfig(name="d", factory="beside_the_toml:make")
    with pytest.raises(DataError, match="No module named 'beside_the_toml'; modules are looked for in /nowhere, in"):
        open_dataset(own, code_dir="/nowhere")
    assert len(open_dataset(own, code_dir=str(tmp_path)).snapshot()) == 10
    assert sys.path[0] == str(tmp_path)


def test_an_unknown_factory_says_install_it():
    """A name that no package offers is told as such."""
    with pytest.raises(DataError, match="no installed package offers the dataset 'nothing'"):
        open_dataset(DatasetConfig(name="d", factory="nothing"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('name="d"', "exactly one of path and factory"),
        ('name="d"\npath="a"\nfactory="b"', "exactly one of path and factory"),
        ('name="d"\npath="a"\ntyp="npz"', "unknown key 'typ'"),
        ('name="d d"\npath="a"', "name"),
    ],
)
def test_configuration_errors_name_the_key(tmp_path, text, reason):
    """A typo in the configuration is found before anything starts."""
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_toml(tmp_path / "c.toml", DatasetConfig)


def test_shards_are_in_order_of_their_numbers(tmp_path):
    """Shard 1000 comes after shard 998, so the newest samples are the newest."""
    for number in (1000, 998, 999):
        np.save(tmp_path / f"x_{number}.npy", np.full((1, 2), number, np.float32))
        np.save(tmp_path / f"y_{number}.npy", np.zeros(1, np.int64))
    snapshot = open_dataset(DatasetConfig(name="d", path=str(tmp_path))).snapshot()
    assert snapshot.batch(np.arange(3))[0][:, 0].tolist() == [998, 999, 1000]
