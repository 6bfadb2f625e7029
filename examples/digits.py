"""A small model for scikit-learn's 8x8 digits; ``digits.bundle`` beside it is this model, exported.

    edge-export bundle examples.digits:build -o examples/digits.bundle

Data: images as they come, 0 to 16, shape ``[1, 8, 8]``; the bundle's preprocessing scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build() -> dict[str, Any]:
    """A convolutional network of 9,814 parameters, weights from a fixed seed."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 36),
        nn.ReLU(),
        nn.Linear(36, 10),
    )
    return {
        "module": module,
        "example_input": torch.rand(32, 1, 8, 8),
        "name": "digits",
        "labels": [str(digit) for digit in range(10)],
        "hyper": {"lr": 0.05, "momentum": 0.9},
        "preprocessing": [{"scale": 1 / 16}],
    }
