"""Parameters that are spread over devices give the sums that whole ones give."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.place import Gathered
from dpgemma.sharding.rules import DATA_AXIS
from tests.privacy import sums
from tests.privacy.released_norm_test import MODEL

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The axis that two devices share, counted from the end; arrays without one are whole on both.
AXES = {
    "embedder/embedding": -2,
    "blocks/mixer/q/w": -3,
    "blocks/mlp/gate/w": -1,
    "blocks/mlp/down/w": -2,
    "final_norm/scale": -1,
}


def compare(strategy: str, steps: float | None = None) -> dict:
    """Differences between sharded and whole parameters, relative to the norm, or the largest one on a grid of so many
    steps; needs two devices.
    """
    from dpgemma.gemma import decoder
    from dpgemma.privacy.tracking import leaf_names
    from tests import objectives as loss_lib

    model = dataclasses.replace(MODEL, max_length=64)
    params = decoder.init_parameters(model, jax.random.key(0))
    row_loss = loss_lib.row_loss(model, bos=2)

    def loss(p, example):
        return row_loss(p, {}, example["row"]) * example["factor"]

    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 40, (8, 10)), jnp.int32)
    batch = {"row": {"tokens": tokens, "scored": jnp.ones(tokens.shape, bool)}, "factor": jnp.ones(8)}
    gathered = [Gathered(DATA_AXIS, AXES[name]) if name in AXES else None for name in leaf_names(params)]

    def spec(leaf, shard):
        return PartitionSpec(*(DATA_AXIS if shard and i == leaf.ndim + shard.axis else None for i in range(leaf.ndim)))

    leaves, structure = jax.tree.flatten(params)
    specs = structure.unflatten([spec(leaf, shard) for leaf, shard in zip(leaves, gathered, strict=True)])
    options = dict(strategy=strategy, microbatch_size=2, steps=steps)
    rows = PartitionSpec(DATA_AXIS)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh_lib.make("data:2"),
        in_specs=(specs, rows, rows),
        out_specs=(specs, rows),
        check_vma=False,
    )
    def sharded(params, batch, mask):
        local = sums.clipped_sum(loss, params, batch, mask, 0.5, shards=gathered, **options)
        leaves, structure = jax.tree.flatten(local.total)
        # What is gathered is a shard of the sum over both devices already.
        added = [x if g else jax.lax.psum(x, DATA_AXIS) for x, g in zip(leaves, gathered, strict=True)]
        return jax.tree.unflatten(structure, added), local.stats.norms

    whole = jax.jit(lambda p, b, m: sums.clipped_sum(loss, p, b, m, 0.5, **options))

    def flat(tree):
        return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]).astype(np.float64)

    differences = {}
    # The last mask leaves one device without a single example: it goes through the other's rounds with it.
    for name, factor, mask in (
        ("all", 1.0, [1] * 8),
        ("nan", np.nan, [1] * 8),
        ("empty", 1.0, [1, 1, 1, 0, 0, 0, 0, 0]),
    ):
        batch["factor"] = jnp.ones(8).at[1].set(factor)
        total, norms = sharded(params, batch, jnp.array(mask, bool))
        expected = whole(params, batch, jnp.array(mask, bool))
        np.testing.assert_allclose(norms, expected.stats.norms, rtol=1e-5)
        away, norm = flat(total) - flat(expected.total), np.linalg.norm(flat(expected.total))
        differences[name] = float(np.abs(away).max() if steps else np.linalg.norm(away) / norm)
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 2.0**20], ids=["floats", "grid"])
@pytest.mark.parametrize("strategy", ["ghost", "per_layer"])
def test_sharded_parameters_give_the_sums_of_whole_ones(strategy, steps):
    # In a process of its own, because the number of CPU devices is fixed once.
    code = (
        "import jax, json; jax.config.update('jax_num_cpu_devices', 2); from tests.privacy import sharded_test;"
        f" print(json.dumps(sharded_test.compare('{strategy}', {steps})))"
    )
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout)
    assert differences.keys() == {"all", "nan", "empty"}
    # On a grid, the last bits of a unit's gradient may decide at which of two points it is cut off.
    assert max(differences.values()) < (1e-5 if steps is None else 8 * 4)


def test_strategies_that_hold_gradients_refuse_shards():
    with pytest.raises(ValueError, match="ghost"):
        sums.clipped_sum(
            lambda w, x: (w * x).sum(),
            jnp.ones(4),
            jnp.ones((1, 4)),
            jnp.ones(1, bool),
            1.0,
            shards=[Gathered("data", -1)],
        )
