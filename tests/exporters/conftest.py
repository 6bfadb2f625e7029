"""Bundles that several tests read; each is exported once per run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporters import export_bundle


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """Exports a module into a new folder and returns the report."""

    def run(module, example, **options):
        path = tmp_path_factory.mktemp("bundle") / "model.bundle"
        return export_bundle(module, example, path, **{"name": "model", **options})

    return run


def dropout_network():
    """A wide network with two dropouts of different rates."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.2), nn.Linear(64, 3)
    )


def convolutional():
    """A small network with 8-channel BatchNorm and max-pooling."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)
    )


@pytest.fixture(scope="session")
def dropout_report(export):
    return export(dropout_network(), torch.randn(8, 6), optimizer="adam")


@pytest.fixture(scope="session")
def convolutional_report(export):
    return export(convolutional(), torch.randn(8, 2, 8, 8))
