"""The published codecs, each for what its paper promises."""

import numpy as np
import pytest

from edge_runtime.compression import Layout
from edge_runtime.compression.packing import random_words
from edge_runtime.compression.pipeline import CodecSpec, check_spec, decode, encode
from edge_runtime.compression.randomk import random_positions
from edge_runtime.errors import CodecError

LAYOUT = Layout(("a", "b", "s"), ((64, 48), (64,), ()))
LAYOUTS = {"delta": LAYOUT}
VECTOR = (np.random.default_rng(0).standard_t(4, LAYOUT.size) * 1e-2).astype(np.float32)


def sent(codec, vector=VECTOR, layouts=None, **arguments):
    """What arrives, without error feedback unless the options have it."""
    options = {"error_feedback": False} | arguments.pop("options", {})
    layouts = layouts or {"delta": Layout(("w",), (vector.shape,))} if vector is not VECTOR else LAYOUTS
    encoded = encode(CodecSpec(codec, options), {"delta": vector}, layouts, **arguments)
    return decode(encoded.data, layouts)["delta"]


def relative_error(codec, **arguments):
    return float(np.square(sent(codec, **arguments).vector() - VECTOR).sum() / np.square(VECTOR).sum())


def mean_of_many(codec, count, **arguments):
    return np.mean([sent(codec, seed=seed, **arguments).vector() for seed in range(count)], axis=0, dtype=np.float64)


def test_half_rounds_to_eleven_bits_whatever_the_scale():
    """Values near 1e-30 or 1e30 keep the precision of float16; those a million times smaller than the largest too."""
    for scale in (1e-30, 1.0, 1e30):
        vector = (VECTOR * np.float32(scale)).astype(np.float32)
        vector[np.abs(vector) < 1e-6 * np.abs(vector).max()] = 0
        np.testing.assert_allclose(sent("half", vector).vector(), vector, rtol=2.0**-11)


def test_half_scales_each_tensor_by_itself():
    """A tensor of large values does not cost the others their precision."""
    layout = {"delta": Layout(("large", "small"), ((8,), (8,)))}
    vector = np.concatenate([np.full(8, 3e38), np.full(8, 1e-30)]).astype(np.float32)
    got = decode(encode(CodecSpec("half"), {"delta": vector}, layout).data, layout)["delta"].vector()
    np.testing.assert_allclose(got, vector, rtol=2.0**-11)


def test_top_k_sends_the_largest_exactly():
    """The hundredth part, at full precision, and nothing else."""
    update = sent("topk")
    assert len(update.indices) == 32
    assert set(update.indices) == set(np.argsort(-np.abs(VECTOR))[:32])
    np.testing.assert_array_equal(update.values, VECTOR[update.indices])


def test_top_k_among_equals_takes_the_first():
    """Equal magnitudes leave no choice to the machine."""
    update = sent("topk", np.full(200, -0.5, np.float32), options={"density": 0.05})
    assert update.indices.tolist() == list(range(10))


@pytest.mark.parametrize("codec", ["topk", "stc"])
def test_zeros_are_never_sent(codec):
    """A vector with three values costs three values, whatever the density."""
    vector = np.zeros(1000, np.float32)
    vector[[5, 500, 999]] = 1, -1, 2
    assert sent(codec, vector, options={"density": 1.0}).indices.tolist() == [5, 500, 999]
    assert sent(codec, np.zeros(1000, np.float32)).indices.tolist() == []


@pytest.mark.parametrize("codec", ["topk", "stc", "randomk"])
def test_densities_out_of_range_are_refused(codec):
    """A density is a fraction above 0."""
    for density in (0.0, -0.1, 1.5):
        with pytest.raises(CodecError, match="density"):
            check_spec(CodecSpec(codec, {"density": density}))
    check_spec(CodecSpec(codec, {"density": 1}))


@pytest.mark.parametrize(("codec", "density"), [("topk", 0.01), ("stc", 0.0025)])
def test_positions_cost_about_their_entropy(codec, density):
    """Random positions take at most 3 percent and some bytes more than the binary entropy says."""
    size = 400_000
    vector = np.zeros(size, np.float32)
    count = int(size * density)
    vector[np.random.default_rng(1).choice(size, count, replace=False)] = 1
    data = encode(CodecSpec(codec, {"density": density}), {"delta": vector}, {"delta": Layout(("w",), ((size,),))}).data
    values = 4 * count if codec == "topk" else count / 8
    entropy = -size * (density * np.log2(density) + (1 - density) * np.log2(1 - density)) / 8
    assert len(data) - values <= 1.03 * entropy + 40


@pytest.mark.parametrize("codec", ["topk", "stc", "randomk"])
@pytest.mark.parametrize("budget", [60, 100, 1000])
def test_a_budget_is_almost_used_up(codec, budget):
    """Rate control leaves no more than a few percent on the table."""
    vector = np.random.default_rng(2).normal(size=20_000).astype(np.float32)
    layouts = {"delta": Layout(("w",), ((20_000,),))}
    data = encode(CodecSpec(codec), {"delta": vector}, layouts, budget_bytes=budget).data
    assert 0.9 * budget - 5 <= len(data) <= budget


def test_int8_is_within_a_step_and_unbiased():
    """Each value moves by less than a step, and the mean over seeds is the value."""
    peak = np.abs(VECTOR[: 64 * 48]).max()
    update = sent("int8", seed=1).vector()
    assert np.abs(update - VECTOR).max() <= peak / 127 * 1.001
    spread = np.abs(mean_of_many("int8", 200) - VECTOR).max()
    assert spread < 5 * 0.5 * peak / 127 / np.sqrt(200)


def test_int4_is_unbiased():
    """Its steps are coarse, its mean is right."""
    peak = np.abs(VECTOR).max()
    assert np.abs(mean_of_many("int4", 300) - VECTOR).max() < 5 * 0.5 * peak / 7 / np.sqrt(300)


@pytest.mark.parametrize(("codec", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_updates_are_entropy_coded(codec, bits):
    """They take less than their width, since small values are frequent, at any size."""
    for size in (3000, 300_000):
        vector = np.random.default_rng(3).normal(size=size).astype(np.float32)
        layouts = {"delta": Layout(("w",), ((size,),))}
        assert len(encode(CodecSpec(codec), {"delta": vector}, layouts).data) < 0.95 * size * bits / 8


def test_zero_stays_zero_when_quantised():
    """What did not move is not moved by chance."""
    vector = VECTOR.copy()
    vector[::2] = 0
    for codec in ("int8", "int4"):
        assert not sent(codec, vector).vector()[::2].any()


def test_seeds_make_a_difference():
    """Two devices with different seeds round differently; one seed decides all."""
    for codec in ("int8", "int4", "eden", "randomk"):
        one, other, again = (sent(codec, seed=seed).vector() for seed in (1, 2, 1))
        assert (one != other).any()
        np.testing.assert_array_equal(one, again)


def test_sign_sends_the_mean_magnitude_of_each_tensor():
    """EF-SignSGD: the sign of each value times the L1 norm over the size."""
    got, given_ = LAYOUT.split(sent("sign").vector()), LAYOUT.split(VECTOR)
    for name, tensor in given_.items():
        np.testing.assert_allclose(got[name], np.where(tensor < 0, -1, 1) * np.abs(tensor).mean(), rtol=1e-6)


def test_one_bit_codecs_take_one_bit():
    """Beside 4 bytes per tensor or block."""
    layouts = {"delta": Layout(("w",), ((100_000,),))}
    vector = np.ones(100_000, np.float32)
    assert len(encode(CodecSpec("sign"), {"delta": vector}, layouts).data) <= 12_500 + 30
    assert len(encode(CodecSpec("eden"), {"delta": vector}, layouts).data) <= 12_500 + 4 * 18 + 40


def test_sparse_ternary_has_one_magnitude():
    """The mean of those it sends, with their signs."""
    update = sent("stc")
    assert len(update.indices) == 8
    np.testing.assert_allclose(np.abs(update.values), np.abs(VECTOR[update.indices]).mean(), rtol=1e-6)
    np.testing.assert_array_equal(np.sign(update.values), np.sign(VECTOR[update.indices]))


def test_eden_errs_as_the_paper_says_and_is_unbiased():
    """Normalised error pi/2 - 1 for one update, falling with the number of updates that are averaged."""
    assert relative_error("eden", seed=4) == pytest.approx(np.pi / 2 - 1, abs=0.05)
    mean = mean_of_many("eden", 200)
    assert np.square(mean - VECTOR).sum() / np.square(VECTOR).sum() < 1.3 * (np.pi / 2 - 1) / 200


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 127, 8191, 8192, 8193, 20_000])
def test_eden_blocks_fit_any_size(size):
    """The tail of a vector is as good as the rest: the error of any size is that of the method."""
    vector = np.random.default_rng(size).normal(size=size).astype(np.float32)
    layouts = {"delta": Layout(("w",), ((size,),))}
    got = sent("eden", vector, layouts, seed=size).vector()
    assert np.square(got - vector).sum() <= 1.5 * np.square(vector).sum()
    if size == 1:
        np.testing.assert_allclose(got, vector, rtol=1e-6)


def test_random_positions_follow_from_the_seed_alone():
    """They are the same on every machine, each equally likely; the first words of Philox are known."""
    assert random_words(0, 3).tolist() == [0x02F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79]
    assert random_positions(7, 5, 40).tolist() == [8, 16, 29, 34, 37]
    hits = np.zeros(40)
    for seed in range(2000):
        positions = random_positions(seed, 5, 40)
        assert len(positions) == 5
        hits[positions] += 1
    assert np.abs(hits - 250).max() < 5 * np.sqrt(250)


def test_random_k_sends_only_seed_and_values():
    """Two bytes a value and a fixed header: positions cost nothing."""
    data = encode(CodecSpec("randomk", {"density": 0.1}), {"delta": VECTOR}, LAYOUTS).data
    assert len(data) <= 2 * 314 + 17 + 9
    exact = sent("randomk", options={"half": False}, seed=3)
    np.testing.assert_array_equal(exact.values, VECTOR[exact.indices])
    np.testing.assert_array_equal(exact.indices, random_positions(3, 32, LAYOUT.size))


def test_unbiased_random_k_has_the_right_mean():
    """Scaled by n/k, the mean over seeds is the update."""
    vector = np.random.default_rng(5).normal(size=50).astype(np.float32)
    options = {"density": 0.2, "unbiased": True, "half": False}
    layouts = {"delta": Layout(("w",), ((50,),))}
    mean = np.mean([sent("randomk", vector, layouts, options=options, seed=s).vector() for s in range(3000)], axis=0)
    np.testing.assert_allclose(mean, vector, atol=5 * 2 * 2.5 / np.sqrt(3000))


def test_powersgd_recovers_what_is_low_rank():
    """A matrix of rank 2 arrives with the precision of float16; vectors do too."""
    dice = np.random.default_rng(6)
    matrix = dice.normal(size=(60, 2)) @ dice.normal(size=(2, 80))
    vector = np.concatenate([matrix.reshape(-1), dice.normal(size=60)]).astype(np.float32)
    layouts = {"delta": Layout(("m", "v"), ((60, 80), (60,)))}
    got = sent("powersgd", vector, layouts, options={"rank": 2}).vector()
    np.testing.assert_allclose(got, vector, atol=2e-3 * np.abs(vector).max())


def test_powersgd_gets_better_by_its_warm_start():
    """The same matrix sent again, without feedback: each round is one more power iteration."""
    dice = np.random.default_rng(7)
    left, right = (np.linalg.qr(dice.normal(size=(50, 50)))[0] for _ in range(2))
    vector = ((left * 0.8 ** np.arange(50)) @ right).astype(np.float32).reshape(-1)
    layouts, spec = {"delta": Layout(("m",), ((50, 50),))}, CodecSpec("powersgd", {"rank": 3, "error_feedback": False})
    errors, state = [], None
    for _ in range(8):
        encoded = encode(spec, {"delta": vector}, layouts, state)
        errors.append(float(np.linalg.norm(encoded.updates["delta"].vector() - vector)))
        state = encoded.state
    best = float(np.linalg.norm(0.8 ** np.arange(3, 50)))
    assert errors[0] > 1.1 * best
    assert errors[-1] < 1.02 * best


def test_powersgd_recovers_from_a_round_of_zeros():
    """A device that did not learn anything once is not stuck at zero."""
    layouts, spec = {"delta": Layout(("m",), ((50, 50),))}, CodecSpec("powersgd")
    zeros = encode(spec, {"delta": np.zeros(2500, np.float32)}, layouts)
    assert not zeros.updates["delta"].vector().any()
    vector = np.outer(np.arange(50), np.ones(50)).astype(np.float32).reshape(-1)
    after = encode(spec, {"delta": vector}, layouts, zeros.state).updates["delta"].vector()
    np.testing.assert_allclose(after, vector, atol=0.1)


def test_powersgd_chooses_its_rank_by_the_budget():
    """From rank to rank the warm start is carried over."""
    vector = np.random.default_rng(8).normal(size=10_000).astype(np.float32)
    layouts, state, errors = {"delta": Layout(("m",), ((100, 100),))}, None, []
    for budget in (500, 900, 5000, 900):
        encoded = encode(
            CodecSpec("powersgd", {"error_feedback": False}), {"delta": vector}, layouts, state, budget_bytes=budget
        )
        assert budget - 400 < len(encoded.data) <= budget
        errors.append(float(np.linalg.norm(encoded.updates["delta"].vector() - vector)))
        state = encoded.state
    assert errors[0] > errors[1] > errors[2] < errors[3]
    with pytest.raises(CodecError, match="below the 403 of rank 1"):
        encode(CodecSpec("powersgd"), {"delta": vector}, layouts, budget_bytes=300)


@pytest.mark.parametrize("rank", [0, 33, -1])
def test_impossible_ranks_are_refused(rank):
    """Decoders accept no more, so that their work is bounded."""
    with pytest.raises(CodecError, match="rank"):
        check_spec(CodecSpec("powersgd", {"rank": rank}))
