"""What one example adds never exceeds the clip norm, in any type and by any strategy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accounting.mechanism import Clip
from dpgemma.data.batch import Batch, Unit
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import clipping, norm_rules, operations
from dpgemma.privacy.clipping import Strategy
from tests import objectives as loss_lib
from tests.privacy import sums

MODEL = dataclasses.replace(
    PRESETS["tiny"], d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=40
)
CLIP_NORM = 0.25
SHAPES = {"first": (5, 4), "second": (4, 3), "third": (3, 1)}
CASES = 500


def released_norms(dtype, cases, **options):
    """Norms in float64 of what random examples, each with parameters of its own, would add alone."""
    loss = loss_lib.row_loss(MODEL, bos=2, dtype=dtype)
    shapes = decoder.parameter_shapes(MODEL)

    @jax.jit
    def alone(key):
        keys = iter(jax.random.split(key, 4 + len(jax.tree.leaves(shapes))))
        spread = 10 ** jax.random.uniform(next(keys), minval=-1.5, maxval=0.5)
        params = jax.tree.map(lambda leaf: spread * jax.random.normal(next(keys), leaf.shape), shapes)
        tokens = jax.random.randint(next(keys), (2, 12), 4, 4 + jax.random.randint(next(keys), (), 1, 36))
        batch = {"tokens": tokens, "scored": jnp.ones(tokens.shape, bool)}
        # Large losses, so that nearly every gradient is clipped, most of them by far.
        factor = 10 ** jax.random.uniform(next(keys), minval=0.0, maxval=6.0)

        def scaled(p, row):
            return loss(p, {}, row) * factor

        got = sums.clipped_sum(scaled, params, batch, jnp.array([True, False]), CLIP_NORM, **options)
        return got.total, got.stats.norms[0]

    norms, before = [], []
    for case in range(cases):
        total, norm = alone(jax.random.key(case))
        norms.append(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(total))))
        before.append(float(norm))
    return np.array(norms), np.array(before)


@pytest.mark.parametrize("cases", [150, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options, least",
    [
        (dict(strategy="example_scan"), 1 - 1e-5),
        pytest.param(dict(strategy="vmap", microbatch_size=2), 1 - 1e-5, marks=pytest.mark.slow),
        pytest.param(dict(strategy="ghost", microbatch_size=2), 0.97, marks=pytest.mark.slow),
        pytest.param(dict(strategy="per_layer", microbatch_size=2), 0.2, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["strategy"] if isinstance(value, dict) else "",
)
def test_pitfall_12_released_norm_never_exceeds_clip_norm(dtype, options, least, cases):
    released, before = released_norms(dtype, cases, **options)
    finite = np.isfinite(before)
    assert finite.sum() > 0.9 * cases
    assert (before[finite] > 10 * CLIP_NORM).mean() > 0.5, "heavily clipped"
    assert released.max() <= CLIP_NORM
    heavily = finite & (before > 1.1 * CLIP_NORM)
    # The margin is no more than the proof needs: what is released stays close to the clip norm.
    assert released[heavily].min() >= least * CLIP_NORM


@pytest.mark.parametrize("steps", [None, 2.0**20], ids=["floats", "grid"])
@pytest.mark.parametrize("strategy", ["example_scan", "vmap", "ghost", "per_layer"])
@pytest.mark.parametrize("scaling, clip_norm", [("clip", 10.0), ("normalise", 10.0), ("automatic", 1.0)])
def test_every_scaling_releases_at_most_its_sensitivity(scaling, clip_norm, strategy, steps):
    """And what its formula says, in float64, where all layers share one norm; of a gradient of any length.

    The loss has three operations, so that per_layer has three groups.
    """
    rng, clip = np.random.default_rng(3), Clip(clip_norm, scaling)
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}

    def loss(p, unit):
        x = operations.linear(unit.rows["x"], p["first"])
        x = operations.linear(jnp.tanh(x), p["second"])
        return operations.linear(x, p["third"]).sum() * unit.rows["factor"][0]

    def of_one(x, factor):
        rows = {"x": jnp.zeros((2, 5)).at[0].set(x), "factor": jnp.zeros(2).at[0].set(factor)}
        batch = Batch.of_rows(rows, jnp.array([True, False]))
        how = Strategy(strategy, 1 if strategy != "vmap" else 2)
        return clipping.clipped_sum(loss, params, batch, clip, how, steps=steps).total

    release = jax.jit(of_one)
    whole = jax.jit(
        jax.grad(
            lambda p, x, f: loss(p, Unit({"x": x[None], "factor": f[None]}, jnp.ones(1, bool))),
        )
    )
    sensitivity = clip_norm if scaling == "clip" else 1.0
    unit = 1.0 if steps is None else sensitivity / steps
    longest = 0.0
    for factor in (1e-4, 1e-2, 1e-1, 1.0, 30.0, 1e4):
        x = jnp.asarray(rng.standard_normal(5), jnp.float32)
        got = [np.asarray(leaf, np.float64) * unit for leaf in jax.tree.leaves(release(x, jnp.float32(factor)))]
        true = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(whole(params, x, jnp.float32(factor)))]
        norm = np.sqrt(sum((g**2).sum() for g in true))
        longest = max(longest, np.sqrt(sum((g**2).sum() for g in got)))
        if strategy == "per_layer":
            continue
        scale = {
            "clip": min(1, clip_norm / norm),
            "normalise": min(1, clip_norm / norm) / clip_norm,
            "automatic": 1 / (norm + 0.01),
        }[scaling]
        for ours, g in zip(got, true, strict=True):
            np.testing.assert_allclose(ours, g * scale, rtol=2e-3, atol=2 * unit)
    assert 0.5 * sensitivity < longest <= sensitivity


@pytest.mark.parametrize("strategy", ["example_scan", "ghost", "per_layer"])
def test_roundings_that_all_go_one_way_are_paid_for(strategy):
    """A unit whose first position lifts every sum to just above a power of two, behind which thousands of small terms
    are rounded up, each by nearly half a unit in the last place: what is released stays within the norm.
    """
    length, width = 4096, 8
    for small in (0.51, 0.75, 0.99):
        x = np.full((length, width), small * 2.0**-23, np.float32)
        x[0] = 1 + 2.0**-23

        def loss(w, row):
            return operations.linear(row, w).sum()

        for clip_norm in (1e-3, 0.7):
            got = sums.clipped_sum(
                loss, jnp.ones((width, 4)), jnp.asarray(x)[None], jnp.ones(1, bool), clip_norm, strategy=strategy
            )
            released = np.linalg.norm(np.asarray(got.total, np.float64))
            assert 0.99 * clip_norm < released <= clip_norm


@pytest.mark.parametrize("strategy", ["example_scan", "ghost", "per_layer"])
def test_rows_that_cancel_each_other_are_paid_for(strategy):
    """A unit whose positions all have nearly the same input, and cotangents of either sign: its gradient is a small
    difference of large sums, which the inner products of rows know to their own rounding only.
    """
    length, width = 512, 2048
    assert norm_rules.norm_rule(length, width, width, "cpu") == "gram"
    for difference in (2.0**-10, 2.0**-8, 2.0**-6):
        x = np.full((length, width), 1.37, np.float32)
        x[: length // 2] *= np.float32(1 + difference)
        sign = np.where(np.arange(length) < length // 2, 1, -1).astype(np.float32)

        def loss(w, row, sign=sign):
            return (operations.linear(row, w)[:, 0] * sign).sum()

        got = sums.clipped_sum(
            loss, jnp.zeros((width, width)), jnp.asarray(x)[None], jnp.ones(1, bool), 0.5, strategy=strategy
        )
        released = np.linalg.norm(np.asarray(got.total, np.float64))
        assert 0 < released <= 0.5


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("strategy", ["example_scan", "ghost", "per_layer"])
def test_pitfall_12_numbers_whose_squares_vanish_or_overflow_are_bounded_too(strategy, size):
    """A cotangent of 1e-23 has no square in float32, and an input of 1e18 makes it a gradient of 1e-5 all the same."""
    for x, g in ((1e18, 1e-23), (1e-23, 1e18), (1e12, 1e-14), (1e19, 1e19), (1e-30, 1e-5)):

        def loss(w, example, g=g):
            return operations.linear(example, w).sum() * jnp.float32(g)

        got = sums.clipped_sum(
            loss, jnp.ones((4, 5)), jnp.full((1, size, 4), x), jnp.ones(1, bool), 1e-6, strategy=strategy
        )
        released = np.linalg.norm(np.asarray(got.total, np.float64))
        assert released <= 1e-6, (x, g)
        # Bounds on what vanishes cost operands only where one of them is that small.
        if 1e-6 < x * g * size < 1e15 and (strategy == "example_scan" or min(x, g) > 1e-16):
            assert released > 1e-7, (x, g)
