"""Gradient canaries: one number of the gradient, clipped as any other gradient is, and nothing else changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accounting.mechanism import Clip
from accounting.mechanism.clip import AUTOMATIC
from dpgemma import Settings
from dpgemma.data import canaries
from dpgemma.data.batch import Batch, Unit
from dpgemma.data.canaries import LEAF, NONE, OFFSET
from dpgemma.objectives.probes import Coordinates, without_probes
from dpgemma.privacy.clipping import Strategy, clipped_sum
from dpgemma.training import prepare

SETTINGS = dict(model="ladder_20k", sequence_length=16, data="synthetic")
PROBED = prepare.objective_of(Settings(**SETTINGS, canaries=4, canary_kind="gradient"))
PLAIN = prepare.objective_of(Settings(**SETTINGS))


def rows_of(leaves, offsets):
    rows = PLAIN.noise_rows(len(leaves))
    return rows | {LEAF: np.array(leaves, np.int32), OFFSET: np.array(offsets, np.int32)}


def unit_of(rows, i):
    return Unit({name: jnp.array(column[i : i + 1]) for name, column in rows.items()}, jnp.ones(1, bool))


def test_texts_have_the_loss_and_the_gradient_that_they_have_without_canaries():
    trainable, frozen = PLAIN.init(0)
    rows = rows_of([NONE], [NONE])
    plain = {name: rows[name] for name in PLAIN.spec}
    losses = [
        jax.jit(jax.value_and_grad(objective.loss))(trainable, frozen, unit_of(of, 0))
        for objective, of in ((PROBED, rows), (PLAIN, plain))
    ]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-6)
    for mine, theirs in zip(*(jax.tree.leaves(gradient) for _, gradient in losses), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_canary_is_one_number_at_its_place(dtype):
    objective = prepare.objective_of(Settings(**SETTINGS, canaries=4, canary_kind="gradient", dtype=dtype))
    trainable, frozen = objective.init(0)
    sizes = [leaf.size for leaf in jax.tree.leaves(trainable)]
    compiled = jax.jit(jax.value_and_grad(objective.loss))
    for leaf in range(len(sizes)):
        unit = unit_of(rows_of([leaf], [sizes[leaf] - 1]), 0)
        loss, gradient = compiled(objective.cast(trainable), frozen, unit)
        leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(gradient)]
        assert loss == 0 and sum(np.count_nonzero(x) for x in leaves) == 1
        assert leaves[leaf].ravel()[-1] == 2.0**40


@pytest.mark.parametrize("name", ["example_scan", "vmap"])
@pytest.mark.parametrize("clip", [Clip(0.5), Clip(1.0, AUTOMATIC)])
def test_a_clipped_sum_holds_a_canary_with_the_whole_sensitivity(name, clip):
    trainable, frozen = PROBED.init(0)
    sizes = [leaf.size for leaf in jax.tree.leaves(trainable)]
    rows = rows_of([NONE, 0, 2, NONE], [NONE, 5, sizes[2] - 1, NONE])
    batch = Batch.of_rows(jax.tree.map(jnp.array, rows), jnp.array([True, True, True, False]))

    def loss(trainable, unit):
        return PROBED.loss(trainable, frozen, unit)

    at = Coordinates(np.array([0, 2]), np.array([5, sizes[2] - 1]))

    @jax.jit
    def summed(batch):
        return clipped_sum(loss, trainable, batch, clip, Strategy(name))

    whole, others = summed(batch), summed(without_probes(batch))
    np.testing.assert_allclose(at.of(whole.total) - at.of(others.total), clip.sensitivity, rtol=1e-4)
    difference = jax.tree.map(lambda a, b: a - b, whole.total, others.total)
    assert sum(int((jnp.abs(x) > 1e-4).sum()) for x in jax.tree.leaves(difference)) == 2
    assert np.asarray(whole.stats.norms)[3] == 0 and np.asarray(others.stats.norms)[[1, 2]].tolist() == [0, 0]


def test_places_are_read_as_jax_orders_leaves():
    shapes, _ = PROBED.shapes()
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
    leaves, offsets = canaries.coordinates(sizes, 50, bytes(32))
    begins = np.cumsum([0, *sizes[:-1]])
    numbered = [jnp.arange(size, dtype=jnp.float32) + begin for size, begin in zip(sizes, begins, strict=True)]
    tree = jax.tree.unflatten(jax.tree.structure(shapes), numbered)
    np.testing.assert_array_equal(Coordinates(leaves, offsets).of(tree), begins[leaves] + offsets)
