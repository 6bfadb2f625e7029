"""One-dimensional k-means near its optimum for any values, and centroids that survive their way."""

import numpy as np
import pytest

from edge_runtime.compression.codebook import Codebook, KMeans
from edge_runtime.compression.rans import Decoder, Encoder
from edge_runtime.errors import CodecError

RNG = np.random.default_rng(7)
TAILED = {
    "normal": RNG.normal(size=700),
    "laplace": RNG.laplace(size=900),
    "student": RNG.standard_t(3, 900),
    "cauchy": RNG.standard_cauchy(500),
    "two-sided tail": np.concatenate([1 + RNG.pareto(3, 400), -1 - RNG.pareto(3, 60)]),
    "small": RNG.standard_t(3, 40),
    "tied": np.round(RNG.normal(size=600), 1),
}


def optimum(values, clusters):
    """Least squared error, by the full dynamic programme."""
    sums, squares = np.append(0, np.cumsum(values)), np.append(0, np.cumsum(values**2))
    n = np.arange(len(values) + 1)
    best = squares - sums**2 / np.maximum(n, 1)
    for _ in range(clusters - 1):
        best = np.array(
            [
                min(
                    best[end],
                    (best[:end] + squares[end] - squares[:end] - (sums[end] - sums[:end]) ** 2 / (end - n[:end])).min(),
                )
                if end
                else 0.0
                for end in n
            ]
        )
    return best[-1]


@pytest.mark.parametrize("name", TAILED)
@pytest.mark.parametrize("clusters", [2, 3, 7, 15])
def test_the_error_is_within_a_hundredth_of_the_optimum(name, clusters):
    """For heavy tails, few values and ties too."""
    values = np.sort(TAILED[name])
    means = KMeans(values, clusters)
    part = means.partition(clusters)
    assert part.sse <= 1.01 * optimum(values, clusters) + 1e-12 * np.square(values).sum()
    centres = np.repeat(means.centres(part.bounds), np.diff(part.bounds))
    np.testing.assert_allclose(np.square(values - centres).sum(), part.sse, rtol=1e-6, atol=1e-9)


def test_many_values_are_partitioned_well():
    """12,000 values of a heavy tail: within a hundredth of what 200 more iterations reach."""
    values = np.sort(RNG.standard_t(3, 12_000))
    means = KMeans(values, 15)
    assert means.partition(15).sse <= 1.01 * means.partition(15, iterations=200).sse


@pytest.mark.parametrize(
    "values", [[0.0], [2.5], [1.0] * 9, [-1e-45, 1e-45], [-3.4e38, 3.4e38, 3.3e38], [0.0, 1e-30, 1.0]]
)
@pytest.mark.parametrize("clusters", [1, 3, 15])
def test_degenerate_values(values, clusters):
    """One value, equal, denormal and huge ones: finite centroids, no more than values, to the precision promised."""
    ordered = np.sort(np.array(values))
    means = KMeans(ordered, clusters)
    centres = means.centres(means.partition(clusters).bounds)
    assert len(centres) <= min(clusters, len(np.unique(ordered)))
    book = Codebook.of(centres)
    assert np.isfinite(book.values).all()
    nearest = book.values[book.assign(centres)].astype(float)
    np.testing.assert_allclose(nearest, centres, rtol=2.0**-6, atol=np.abs(centres).max() * 2.0**-28 + 2e-45)


@pytest.mark.parametrize("levels", [1, 2, 15, 16, 17, 64])
@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 1e37])
def test_a_codebook_comes_back(levels, scale):
    """Bit for bit, ascending, in the bits announced; more mantissa for large codebooks."""
    centres = np.sort(np.random.default_rng(levels).normal(size=levels)) * scale
    book = Codebook.of(centres)
    encoder = Encoder()
    book.write(encoder)
    payload = encoder.finish()
    assert len(payload) <= Codebook.bits(len(book.values)) / 8 + 1
    decoder = Decoder(payload)
    again = Codebook.read(decoder, len(book.values))
    decoder.finish()
    assert again.values.tobytes() == book.values.tobytes()
    assert (np.diff(again.values) > 0).all()


@pytest.mark.parametrize(
    ("exponent", "codes", "reason"),
    [
        (60, [5, 5], "not in order"),
        (60, [5, -5], "not in order"),
        (60, [1 << 10], "not finite"),
        (255, [900], "not finite"),
    ],
)
def test_impossible_codebooks_are_refused(exponent, codes, reason):
    """Hostile centroids: unordered, infinite, beyond float32."""
    with pytest.raises(CodecError, match=reason):
        Codebook(exponent, np.array(codes), 5)
