"""``edge-energy prune``: a bundle whose step is predicted to cost less, and what it says about it."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")
pytest.importorskip("scipy")

from torch import nn  # noqa: E402

from edge_runtime.bundle import Bundle  # noqa: E402
from energy import cli  # noqa: E402
from energy.thor.bundle import bundle_layers  # noqa: E402
from energy.thor.estimate import estimate  # noqa: E402
from energy.thor.features import flops  # noqa: E402
from energy.thor.fitting import fit_profile  # noqa: E402
from energy.thor.layers import partition  # noqa: E402
from energy.thor.profile import Cost, Device, Family, Point, Profile, load_profile, save_profile  # noqa: E402
from exporters._tuning import Samples  # noqa: E402
from exporters.thinning import Task, chance, description  # noqa: E402

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 3),
    )
    return {"module": module, "example_input": torch.randn(8, 4, 20), "name": "waves"}
"""


def profile_of(layers, path, quantity="modelled_joules", dear=""):
    """A device on which layers cost what their FLOPs say, and those of the kind ``dear`` a hundred times as much."""
    rng = random.Random(0)
    families = []
    for kind in sorted({layer.kind for layer in layers}):
        points = []
        base = [layer.sizes for layer in layers if layer.kind == kind]
        for _ in range(12):
            sizes = {name: max(1, round(size * rng.uniform(0.3, 1.2))) for name, size in rng.choice(base).items()}
            mean = 1e-6 + 1e-9 * flops(kind, sizes) * (100 if kind == dear else 1)
            points.append(Point(sizes=sizes, costs={quantity: Cost(mean=mean, relative_error=0.01)}))
        families.append(Family(kind=kind, points=points))
    made = Profile(
        device=Device(name="board", board="made up", cpu="made up"), quantity=quantity, families=families, fixed={}
    )
    save_profile(fit_profile(made), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "waves_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "waves_model", raising=False)
    random = np.random.default_rng(0)
    for name, count in (("train", 300), ("test", 100)):
        x = random.normal(size=(count, 4, 20)).astype(np.float32)
        np.savez(f"{name}.npz", x=x, y=x[:, :3].mean(2).argmax(1))
    module = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(),
                           nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 3))  # fmt: skip
    empty = Samples(torch.zeros(0), torch.zeros(0))
    profile_of(
        partition(description(module, torch.randn(8, 4, 20), Task("cross_entropy", "sgd", empty, empty)), 32),
        tmp_path / "energy-profile.json",
    )
    return tmp_path


def prune(*extra):
    files = ["--profile", "energy-profile.json", "--data", "train.npz", "-o", "thin.bundle"]
    return cli.main(["prune", "waves_model:build", *files, "--epochs", "2", *extra])


def test_the_bundle_costs_the_share_that_was_asked_for(folder, capsys):
    """The written bundle is predicted at the share or less, and the JSON calls modelled joules modelled."""
    assert prune("--test", "test.npz", "--share", "0.6", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    before, after = found["before"], found["after"]
    assert found["quantity"] == "modelled_joules"
    assert not any(key.startswith("predicted_joules") for key in before)
    cost = "predicted_modelled_joules_per_step"
    assert 0 < after[cost] <= 0.6 * before[cost]
    assert after["flops_per_sample"] < before["flops_per_sample"]
    assert after["parameters"] < before["parameters"]
    assert after["bundle_bytes"] == (folder / "thin.bundle").stat().st_size < before["bundle_bytes"]
    name, layers = bundle_layers(folder / "thin.bundle", 32)
    assert name == "waves"
    predicted = estimate(load_profile(folder / "energy-profile.json"), layers).total
    assert predicted == pytest.approx(after[cost])
    assert found["removals"][-1]["cost"] == pytest.approx(predicted)


def test_what_is_dear_on_the_device_is_thinned(folder):
    """Where dense layers are what costs, their inputs go, though convolutions hold most FLOPs."""
    profile_of(partition(_described(), 32), folder / "energy-profile.json", quantity="joules", dear="linear")
    assert prune("--test", "test.npz", "--share", "0.7") == 0
    shapes = {entry.name: entry.shape for entry in Bundle.open(folder / "thin.bundle").manifest.parameters}
    assert shapes["6.weight"][1] < 24
    assert shapes["0.weight"][0] == 16


def _described():
    import waves_model

    built = waves_model.build()
    empty = Samples(torch.zeros(0), torch.zeros(0))
    return description(built["module"], built["example_input"], Task("cross_entropy", "sgd", empty, empty))


@pytest.mark.usefixtures("folder")
def test_the_table_says_what_is_predicted_and_what_was_lost(capsys):
    """Text names the quantity with its word, both accuracies and the points between them."""
    assert prune("--test", "test.npz") == 0
    text = capsys.readouterr().out
    assert "predicted modelled joules per step" in text
    assert "accuracy" in text
    assert "points" in text


def test_too_much_lost_is_an_error_and_the_bundle_is_there(folder, capsys):
    """``--most-loss`` below what was lost gives exit code 1."""
    assert prune("--test", "test.npz", "--most-loss", "-100") == 1
    assert "points of accuracy were lost" in capsys.readouterr().err
    assert (folder / "thin.bundle").exists()


@pytest.mark.usefixtures("folder")
def test_few_samples_need_a_test_set(capsys):
    """A tenth of a handful judges nothing; the message names ``--test``."""
    x = np.zeros((30, 4, 20), np.float32)
    np.savez("train.npz", x=x + np.arange(30)[:, None, None], y=np.arange(30) % 3)
    assert prune() == 2
    assert "--test" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_weights_of_another_model_are_refused(capsys):
    """The message names the file and says what does not fit."""
    from safetensors.numpy import save_file

    save_file({"0.weight": np.zeros((2, 2), np.float32)}, "other.safetensors")
    assert prune("--test", "test.npz", "--weights", "other.safetensors") == 2
    assert "other.safetensors" in capsys.readouterr().err


def test_a_share_that_cannot_be_reached_is_refused(folder, capsys):
    """Nothing is written, and the message says how far it went."""
    assert prune("--test", "test.npz", "--share", "0.01") == 1
    assert "pruning stops at" in capsys.readouterr().err
    assert not (folder / "thin.bundle").exists()


@pytest.mark.usefixtures("folder")
def test_a_missing_file_is_said_without_the_agent(capsys):
    """Whoever prunes has no agent to configure; the option is named."""
    files = ["--profile", "energy-profile.json", "-o", "thin.bundle", "--data"]
    assert cli.main(["prune", "waves_model:build", *files, "nothere.npz"]) == 2
    said = capsys.readouterr().err
    assert "--data nothere.npz: there is no such file" in said
    assert "agent" not in said
    np.savez("odd.npz", images=np.zeros((3, 4, 20), np.float32))
    assert cli.main(["prune", "waves_model:build", *files, "odd.npz"]) == 2
    said = capsys.readouterr().err
    assert "odd.npz" in said
    assert "agent" not in said


@pytest.mark.usefixtures("folder")
def test_an_untrained_model_and_an_end_below_the_share_are_said(capsys):
    """Fresh weights answer by chance; whole blocks of channels overshoot."""
    assert prune("--test", "test.npz", "--share", "0.97") == 0
    said = capsys.readouterr().err
    assert "no better than chance: was it trained?" in said
    assert "below the 97% asked for: steps are of 4 channels or more" in said


def test_chance_is_the_commonest_class():
    """Of 100 samples with 80 of one class, 80 % and two standard errors; none for numbers."""
    y = torch.tensor([0] * 80 + [1] * 20)
    samples = Samples(torch.zeros(100, 1), y)
    assert chance(Task("cross_entropy", "sgd", samples, samples)) == pytest.approx(0.88)
    assert chance(Task("mean_squared_error", "sgd", samples, samples)) is None
