"""What the cost of a layer is taken to depend on."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from energy.thor.features import BLOCKS, FEATURES, features, flops  # noqa: E402

CONV = {
    "batch": 8,
    "in_channels": 12,
    "out_channels": 20,
    "in_positions": 64,
    "out_positions": 36,
    "kernel_positions": 9,
}


def column(kind: str, sizes: dict[str, int], name: str, block: int = 1) -> float:
    return float(np.exp(features(kind, [sizes], block)[0, FEATURES.index(name)]))


def test_flops_of_a_convolution_are_counted_in_blocks_of_channels() -> None:
    """Work is 2 per multiply-add, with channels as they are or rounded up to the library's block."""
    assert flops("conv2d", CONV) == pytest.approx(2 * 8 * 36 * 9 * 12 * 20)
    assert column("conv2d", CONV, "blocked_flops", 8) == pytest.approx(2 * 8 * 36 * 9 * 16 * 24)
    assert column("conv2d", CONV, "input_elements", 8) == pytest.approx(8 * 64 * 16)


def test_images_are_not_rounded_up_to_a_block() -> None:
    """Three input channels have kernels of their own; four have not."""
    image, four = {**CONV, "in_channels": 3}, {**CONV, "in_channels": 4}
    assert column("conv2d", image, "flops", 8) == pytest.approx(2 * 8 * 36 * 9 * 3 * 24)
    assert column("conv2d", four, "flops", 8) == column("conv2d", four, "blocked_flops", 8)


def test_depthwise_work_grows_with_channels_not_with_their_square() -> None:
    """A depthwise layer of twice the channels does twice the work."""
    small = {**CONV, "in_channels": 16, "out_channels": 16, "groups": 16}
    large = {**CONV, "in_channels": 32, "out_channels": 32, "groups": 32}
    assert flops("conv2d-depthwise", large) == pytest.approx(2 * flops("conv2d-depthwise", small))


@pytest.mark.parametrize("kind", ["conv2d-input", "linear", "relu", "bias", "lstm", "multihead_attention", "mean"])
@pytest.mark.parametrize("block", BLOCKS)
def test_twice_the_batch_is_twice_the_work(kind: str, block: int) -> None:
    """Every kind's work is finite, positive and follows the batch."""
    once, twice = features(kind, [CONV, {**CONV, "batch": 16}], block)[:, FEATURES.index("flops")]
    assert np.isfinite(once)
    assert np.exp(twice - once) == pytest.approx(2.0)


def test_optimizer_depends_on_its_elements_alone() -> None:
    """The sizes that an optimiser lacks count as 1."""
    row = features("optimizer-adam", [{"elements": 1000}])
    assert np.exp(row[0, FEATURES.index("flops")]) == pytest.approx(2000)
    assert np.count_nonzero(row) == 3
    assert features("relu", []).shape == (0, len(FEATURES))
