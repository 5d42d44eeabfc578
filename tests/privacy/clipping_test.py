import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.mechanism import Clip
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import clipping, norms
from tests import objectives as loss_lib
from tests.privacy import sums

STRATEGIES = [("example_scan", 1), ("vmap", 1), ("vmap", 2), ("vmap", 4)]
MODEL = dataclasses.replace(
    PRESETS["tiny"], d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=40
)


def linear_loss(params, example):
    """Gradient = example, so that norms are known exactly."""
    return jnp.vdot(params["a"], example["a"]) + jnp.vdot(params["b"], example["b"])


def linear_batch(rng, size, scale=1.0):
    return {
        "a": jnp.asarray(rng.normal(size=(size, 7)) * scale, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(size, 3, 5)), jnp.float32),
    }


PARAMS = {"a": jnp.zeros(7), "b": jnp.zeros((3, 5))}


@functools.lru_cache
def gemma_problem(rows=8, dtype=jnp.float32, length=12):
    """(loss, parameters, batch) of a tiny Gemma; the same objects each time, so that compiled functions are found
    again.
    """
    rng = np.random.default_rng(3)
    params = decoder.init_parameters(MODEL, jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    tokens = jnp.asarray(rng.integers(4, 40, (rows, length)), jnp.int32)
    loss = loss_lib.row_loss(MODEL, bos=2, dtype=dtype)
    return lambda params, row: loss(params, {}, row), params, {"tokens": tokens, "scored": jnp.ones(tokens.shape, bool)}


@functools.lru_cache
def compiled_gradient(loss):
    return jax.jit(jax.grad(loss))


@functools.partial(jax.jit, static_argnums=(0, 4), static_argnames=("strategy", "microbatch_size"))
def clipped_sum(loss, params, batch, mask, clip_norm, **options):
    return sums.clipped_sum(loss, params, batch, mask, clip_norm, **options)


def reference(loss, params, batch, mask, clip_norm):
    """The definition, example by example, in float64 after the gradient."""
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for i in np.flatnonzero(mask):
        gradient = jax.tree.map(
            lambda g: np.asarray(g, np.float64),
            compiled_gradient(loss)(params, jax.tree.map(lambda x, i=i: x[i], batch)),
        )
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
        if np.isfinite(norm):
            factor = min(1.0, clip_norm / norm) if norm else 1.0
            total = jax.tree.map(lambda t, g, factor=factor: t + factor * g, total, gradient)
    return total


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def relative_error(got, expected):
    return np.linalg.norm(flat(got) - flat(expected)) / max(np.linalg.norm(flat(expected)), 1e-30)


@pytest.mark.parametrize("strategy, size", STRATEGIES)
@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_equals_the_definition_on_gemma(strategy, size, clip_norm, quick_compiles):
    loss, params, batch = gemma_problem()
    mask = jnp.array([True, True, False, True, True, True, False, False])
    got = clipped_sum(loss, params, batch, mask, clip_norm, strategy=strategy, microbatch_size=size)
    assert relative_error(got.total, reference(loss, params, batch, mask, clip_norm)) < 1e-5
    assert got.sensitivity == clip_norm
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got.total))


@pytest.mark.parametrize("size", [1, 4])
def test_equals_a_plain_vmap(size, quick_compiles):
    loss, params, batch = gemma_problem()
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    norms = jnp.sqrt(sum(jnp.sum(g.reshape(8, -1) ** 2, axis=1) for g in jax.tree.leaves(gradients)))
    expected = jax.tree.map(lambda g: jnp.tensordot(jnp.minimum(1, 0.5 / norms), g, 1), gradients)
    got = clipped_sum(loss, params, batch, jnp.ones(8, bool), 0.5, strategy="vmap", microbatch_size=size)
    assert relative_error(got.total, expected) < 1e-5
    np.testing.assert_allclose(got.stats.norms, norms, rtol=1e-5)


def test_equals_jax_privacy():
    loss, params, batch = gemma_problem()
    theirs = jax.jit(jax_privacy.clipping.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=1, keep_batch_dim=False))
    ours = clipped_sum(loss, params, batch, jnp.ones(8, bool), 0.5)
    assert relative_error(ours.total, theirs(params, batch)) < 1e-5


@pytest.mark.parametrize("strategy, size", STRATEGIES)
def test_pitfall_4_padding_contributes_exact_zeros(strategy, size):
    rng = np.random.default_rng(0)
    batch = linear_batch(rng, 8)
    mask = jnp.array([True, False, True, True, False, False, False, False])

    def run(b):
        return clipped_sum(linear_loss, PARAMS, b, mask, 1.0, strategy=strategy, microbatch_size=size)

    expected = run(batch)
    for content in (np.nan, np.inf, 1e38, 0.0):
        filled = jax.tree.map(lambda x, c=content: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, c), batch)
        got = run(filled)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("strategy, size", STRATEGIES)
def test_pitfall_5_empty_batch_is_a_zero_sum(strategy, size):
    got = clipped_sum(
        linear_loss,
        PARAMS,
        linear_batch(np.random.default_rng(0), 4),
        jnp.zeros(4, bool),
        1.0,
        strategy=strategy,
        microbatch_size=size,
    )
    assert not flat(got.total).any() and not flat(got.stats).any()


@pytest.mark.parametrize("strategy, size", STRATEGIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_pitfall_11_a_bad_example_is_dropped_whole(strategy, size, bad):
    batch = linear_batch(np.random.default_rng(0), 4)
    spoiled = {**batch, "a": batch["a"].at[1, 2].set(bad)}

    def run(b, mask):
        return clipped_sum(linear_loss, PARAMS, b, jnp.array(mask), 1.0, strategy=strategy, microbatch_size=size)

    got = run(spoiled, [True] * 4)
    without = run(batch, [True, False, True, True])
    np.testing.assert_array_equal(flat(got.total), flat(without.total))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e6, 1e18, 1e25]),
    clip_norm=st.sampled_from([1e-3, 0.5, 1.0, 100.0]),
    special=st.sampled_from([None, np.nan, np.inf]),
)
def test_pitfall_2_neighbour_difference_is_bounded(seed, scale, clip_norm, special):
    # pitfall 2: the released quantity is a sum, and one unit more or less moves it by at most the clip norm.
    rng = np.random.default_rng(seed)
    batch = linear_batch(rng, 6, scale)
    if special is not None:
        batch = {**batch, "b": batch["b"].at[2, 1, 1].set(special)}
    mask = rng.random(6) < 0.7
    for unit in (0, 2):
        sums = [
            flat(clipped_sum(linear_loss, PARAMS, batch, jnp.array(mask).at[unit].set(present), clip_norm).total)
            for present in (True, False)
        ]
        # Six float32 additions round.
        assert np.linalg.norm(sums[0] - sums[1]) <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("strategy, size", [("example_scan", 1), ("vmap", 4)])
def test_pitfall_12_released_norm_never_exceeds_clip_norm(dtype, strategy, size):
    # pitfall 12: with a second computation of the gradient in bfloat16 the excess would be 1e-3; plain float32 scaling
    # exceeds by 1e-7.
    loss, params, batch = gemma_problem(rows=4, dtype=dtype)
    run = jax.jit(
        lambda p, mask: clipped_sum(loss, p, batch, mask, 0.25, strategy=strategy, microbatch_size=size).total
    )
    for _ in range(10):
        params = jax.tree.map(lambda leaf: leaf * 1.03, params)
        for i in range(4):
            released = np.linalg.norm(flat(run(params, jnp.arange(4) == i)))
            assert 0.25 * (1 - 1e-5) <= released <= 0.25


def test_released_norm_is_bounded_where_sequential_summation_stagnates():
    # 2^25 equal entries: a float32 running sum of squares stops growing at 2^24.
    size = 2**25

    def loss(params, example):
        return jnp.sum(params * example)

    got = clipped_sum(loss, jnp.zeros(size), jnp.ones((1, 1)), jnp.array([True]), 1.0)
    assert 1 - 1e-5 <= np.linalg.norm(np.asarray(got.total, np.float64)) <= 1.0


def test_norm_error_stays_within_the_proved_margin():
    rng = np.random.default_rng(5)
    for size in (1, 3, 1000, 300_000):
        tree = {
            "x": jnp.asarray(rng.lognormal(0, 4, size), jnp.float32),
            "y": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32),
        }
        exact = np.sqrt((flat(tree) ** 2).sum())
        assert abs(float(norms.l2_norm(tree)) / exact - 1) < norms.margin(tree) < 1e-5


def test_pitfall_18_examples_do_not_influence_each_other():
    loss, params, batch = gemma_problem(rows=4)
    only = jnp.arange(4) == 1
    before = clipped_sum(loss, params, batch, only, 1.0).total
    after = clipped_sum(loss, params, {**batch, "tokens": batch["tokens"].at[0].set(5).at[3].set(7)}, only, 1.0).total
    np.testing.assert_array_equal(flat(before), flat(after))


@pytest.mark.slow
def test_infinite_clip_norm_is_the_plain_gradient(quick_compiles):
    loss, params, batch = gemma_problem(rows=4)
    got = clipped_sum(loss, params, batch, jnp.ones(4, bool), float("inf")).total
    expected = jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, batch).sum())(params)
    assert relative_error(got, expected) < 1e-5


def test_bfloat16_gradients_are_summed_in_float32():
    # pitfall 12: 4096 unit gradients in bfloat16 would stagnate at 512.
    def loss(params, example):
        return (params.astype(jnp.bfloat16) * example.astype(jnp.bfloat16)).sum().astype(jnp.float32)

    got = clipped_sum(loss, jnp.zeros(1), jnp.ones((4096, 1)), jnp.ones(4096, bool), float("inf"))
    assert float(got.total[0]) == 4096.0


@pytest.mark.parametrize(
    "options",
    [{"strategy": "ghostly"}, {"strategy": "vmap", "microbatch_size": 3}, {"clip_norm": 1e-9}, {"clip_norm": np.nan}],
)
def test_bad_options_are_refused(options):
    options = {"clip_norm": 1.0, **options}
    with pytest.raises(ValueError):
        sums.clipped_sum(linear_loss, PARAMS, linear_batch(np.random.default_rng(0), 4), jnp.ones(4, bool), **options)


def test_a_clip_that_is_not_divided_out_has_one_norm():
    """Otherwise contributions of norm 5 would be summed at a stated sensitivity of 1."""
    batch = Batch.of_rows({"x": jnp.ones((2, 3))}, jnp.ones(2, bool))

    def loss(w, unit):
        return jnp.vdot(w, unit.rows["x"][0])

    with pytest.raises(ValueError, match="no known sensitivity"):
        clipping.clipped_sum(loss, jnp.zeros(3), batch, Clip(1.0), norm=5.0)


def test_agrees_with_optax_per_example_clipping():
    rng = np.random.default_rng(1)
    batch = linear_batch(rng, 5)
    gradients = [batch["a"], batch["b"]]
    theirs, _ = optax.per_example_global_norm_clip(gradients, 1.5)
    ours = clipped_sum(linear_loss, PARAMS, batch, jnp.ones(5, bool), 1.5).total
    assert relative_error([ours["a"], ours["b"]], theirs) < 1e-5
