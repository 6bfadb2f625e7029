"""Convolutions whose cost is known: channels in blocks of 8, traffic, and a log-normal noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.thor.profile import Cost, Device, Family, Fitted, Point, Profile

if TYPE_CHECKING:
    import numpy as np

    from energy.thor.layers import Sizes


def draw(random: np.random.Generator, count: int) -> list[Sizes]:
    """Sizes of convolutions."""
    found = []
    for _ in range(count):
        side, stride = int(random.integers(6, 33)), int(random.integers(1, 3))
        found.append(
            {
                "batch": int(random.integers(4, 65)),
                "in_channels": int(random.integers(4, 65)),
                "out_channels": int(random.integers(4, 65)),
                "in_positions": side**2,
                "out_positions": ((side - 3) // stride + 1) ** 2,
                "kernel_positions": 9,
                "stride": stride,
            }
        )
    return found


def cost(sizes: Sizes) -> float:
    """Joules of a step, without noise."""
    wide_in, wide_out = (-(-sizes[name] // 8) * 8 for name in ("in_channels", "out_channels"))
    work = sizes["batch"] * sizes["out_positions"] * 9 * wide_in * wide_out
    moved = sizes["batch"] * (sizes["in_positions"] * sizes["in_channels"] + sizes["out_positions"] * wide_out)
    return 1e-9 * work + 2e-8 * moved + 1e-4


def measured(random: np.random.Generator, rows: list[Sizes], noise: float = 0.03) -> list[float]:
    """Costs with noise."""
    return [cost(row) * float(factor) for row, factor in zip(rows, random.lognormal(0, noise, len(rows)), strict=True)]


def parameters(points: int) -> dict[str, list[float]]:
    """A model of one feature, the work (fixed by hand: no SciPy needed)."""
    one = {"block": 8.0, "columns": 8.0, "center": 18.0, "scale": 2.0, "length": 2.0, "signal": 0.3, "trend": 1.0}
    named = {name: [value] for name, value in {**one, "noise": 0.05, "floor": 1e-6, "offset": -2.0}.items()}
    return {**named, "steps": [], "step_length": [], "step_signal": [], "doubt": [1.0] * points}


def profile(rows: list[Sizes], joules: list[float], *, kind: str = "conv2d", **more: object) -> Profile:
    """A profile of one kind, with the model of :func:`parameters`."""
    points = [
        Point(sizes=row, costs={"joules": Cost(mean=value, relative_error=0.01)})
        for row, value in zip(rows, joules, strict=True)
    ]
    family = Family(kind=kind, points=points, fitted={"joules": Fitted(parameters=parameters(len(rows)))})
    device = Device(name="bench", board="", cpu="")
    return Profile(device=device, quantity="joules", families=[family], fixed={"joules": 0.001}, **more)  # type: ignore[arg-type]
