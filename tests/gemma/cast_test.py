"""Matrices are cast to the compute type once in a step, and this changes nothing: each use would cast them anyway."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpgemma.data.batch import Unit
from dpgemma.gemma import decoder, lora
from tests import objectives
from tests.sharding.eight import small

FAMILIES = [
    pytest.param("vaultgemma_1b", marks=pytest.mark.slow), "gemma_2b", "gemma2_2b", "gemma3_1b",
    pytest.param("recurrentgemma_2b", marks=pytest.mark.slow),
]  # fmt: skip


def random_like(shapes, scale=0.3):
    """Of numbers that bfloat16 does not hold."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_is_that_of_the_cast_parameters_bit_for_bit(family, rank):
    model = small(family)
    if rank:
        model = dataclasses.replace(model, lora=lora.adapters(model, rank, 2.0, "all"))
    objective = objectives.causal(model, length=7, dtype=jnp.bfloat16)
    trainable, frozen = (random_like(part) for part in objective.shapes())
    cast = objective.cast(trainable)
    tokens = np.random.default_rng(1).integers(4, 200, (1, 7)).astype(np.int32)
    unit = Unit({"tokens": tokens, "scored": np.ones((1, 7), bool)}, jnp.ones(1, bool))
    with jax.disable_jit():  # a compiler may leave out a rounding
        losses = [objective.loss(params, frozen, unit) for params in (trainable, cast)]
    assert np.isfinite(losses[0]) and losses[0] == losses[1]
    kept = sum(leaf.size for leaf in jax.tree.leaves(cast) if leaf.dtype == jnp.float32)
    most = 0.2 if "recurrent" in family else 0.03  # gates of a recurrent unit are computed in float32
    assert kept <= most * decoder.count(trainable)
    in_float32 = objectives.causal(model, length=7, dtype=jnp.float32).cast(trainable)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(in_float32))
