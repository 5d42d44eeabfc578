"""Sums on a grid: neighbours are as far apart as the sensitivity says, whatever order, batch and devices."""

import hashlib
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from accounting.mechanism import Clip, dp_sgd, grid
from dpgemma.data.batch import Batch
from dpgemma.privacy import clipping, operations
from dpgemma.privacy.clipping import Strategy
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.step import TrainState, make_train_step, sharded_clipped_sum
from tests.training import step_test

WIDTH = 64
STEPS = grid.sensitivity_steps(20, 1.0)
WAYS = [("example_scan", 1), ("example_scan", 4), ("vmap", 512), ("ghost", 1), ("ghost", 8), ("per_layer", 4)]


def loss(w, unit):
    """Its gradient by w is the unit's row."""
    return operations.linear(unit.rows["x"], w).sum()


def adversarial(size):
    """Rows whose float32 sums move by several clip norms of 0.7 with the first of them.

    Half of the rows bring every coordinate just below a power of two, and the first one over it. What is taken off
    behind them is a little less than half of the spacing of floats above that power: there it is lost, and below the
    power it is rounded up to a whole spacing.
    """
    half = size // 2
    rows = np.full((size, WIDTH), -(half / 16) * 2.0**-24 * (1 - 2.0**-6), np.float32)
    rows[0], rows[1:half] = 0.7 / np.sqrt(WIDTH) * (1 - 1e-4), 1 / 16
    return rows


def total(rows, mask, way, clip_norm, steps, devices=1):
    batch = Batch.of_rows({"x": rows}, mask)
    arguments = (lambda w, _, unit: loss(w, unit)), jnp.zeros((WIDTH, 1)), {}, batch, Clip(clip_norm), Strategy(*way)
    run = jax.jit(lambda: sharded_clipped_sum(*arguments, mesh_lib.make(f"data:{devices}"), steps=steps).total)
    found = run()
    assert found.dtype == (jnp.float32 if steps is None else jnp.int32)
    return np.asarray(found).reshape(-1)


def distance(one, other):
    """Of sums in steps and modulo 2^32, exactly."""
    moved = (one.astype(np.int64) - other + 2**31) % 2**32 - 2**31
    return math.sqrt(sum(int(x) ** 2 for x in moved))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
@pytest.mark.parametrize("devices", [1, 2])
def test_an_adversarial_batch_moves_the_sum_by_the_sensitivity_at_most(way, devices):
    size, clip_norm = 4096, 0.7
    rows, everyone = adversarial(size), np.ones(size, bool)
    without = everyone.copy()
    without[0] = False
    exact = [total(rows, mask, way, clip_norm, jnp.float32(STEPS), devices) for mask in (everyone, without)]
    moved = distance(*exact)
    assert 0.99 * STEPS < moved <= STEPS


def test_the_adversarial_batch_is_one_for_float32():
    size, clip_norm = 16384, 0.7
    rows, everyone = adversarial(size), np.ones(size, bool)
    without = everyone.copy()
    without[0] = False
    sums = [total(rows, mask, ("example_scan", 1), clip_norm, None).astype(float) for mask in (everyone, without)]
    assert np.linalg.norm(sums[0] - sums[1]) > 2 * clip_norm


def test_random_neighbours_are_no_further_apart_than_the_sensitivity():
    """1,000 batches of up to 65,536 units, of every scale; one of them goes, or becomes empty."""
    rng, furthest = np.random.default_rng(0), 0.0

    @jax.jit
    def sum_of(rows, mask):
        batch, how = Batch.of_rows({"x": rows}, mask), Strategy("vmap", min(len(mask), 8192))
        return clipping.clipped_sum(loss, jnp.zeros((8, 1)), batch, Clip(0.3), how, steps=jnp.float32(STEPS)).total

    for _ in range(1000):
        size = int(2 ** rng.uniform(0, 16))
        slots = next(slots for slots in (64, 1024, 8192, 65536) if slots >= size)
        rows = np.zeros((slots, 8), np.float32)
        rows[:size] = rng.standard_normal((size, 8)) * 10 ** rng.uniform(-4, 4, (size, 1))
        mask = np.arange(slots) < size
        unit = rng.integers(size)
        other_rows, other_mask = rows.copy(), mask.copy()
        if rng.random() < 0.5:
            other_mask[unit] = False
        else:
            other_rows[unit] = 0
        one, other = (np.asarray(sum_of(*batch)).reshape(-1) for batch in ((rows, mask), (other_rows, other_mask)))
        furthest = max(furthest, distance(one, other))
    assert 0.99 * STEPS < furthest <= STEPS


@pytest.mark.parametrize("way", [way for way in WAYS if way[1] <= 8], ids=lambda way: f"{way[0]}-{way[1]}")
@pytest.mark.parametrize("scaling", ["clip", "normalise", "automatic"])
def test_a_coarse_grid_lengthens_no_gradient(way, scaling):
    """With 30 steps to the sensitivity, rounding to the nearest point would lengthen gradients by up to a tenth."""
    rng, clip = np.random.default_rng(0), Clip(1.0 if scaling == "automatic" else 0.4, scaling)

    @jax.jit
    def of_one(row):
        rows = jnp.zeros((8, WIDTH)).at[0].set(row)
        batch = Batch.of_rows({"x": rows}, np.arange(8) < 1)
        return clipping.clipped_sum(loss, jnp.zeros((WIDTH, 1)), batch, clip, Strategy(*way), steps=30.0).total

    norms = []
    for _ in range(200):
        row = rng.standard_normal(WIDTH) * rng.exponential(size=WIDTH) * 10 ** rng.uniform(-1, 3)
        norms.append(np.linalg.norm(np.asarray(of_one(row.astype(np.float32)), float)))
    assert 28 < max(norms) <= 30


def test_a_sum_is_the_same_modulo_2_to_the_32_where_it_wraps_around():
    size = 4096
    rows = np.full((size, WIDTH), 1.0, np.float32)
    steps = grid.sensitivity_steps(24, 1.0)
    got = total(rows, np.ones(size, bool), ("vmap", 64), 1.0, jnp.float32(steps))
    one = total(rows[:64], np.arange(64) < 1, ("vmap", 64), 1.0, jnp.float32(steps))
    assert int(one[0]) * size > 2**31
    assert ((got.astype(np.int64) - one.astype(np.int64) * size) % 2**32 == 0).all()


def small_problem():
    """(loss, parameters, rows) of a network of two layers."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((5, 40)).astype(np.float32),
        "b": rng.standard_normal((40, 1)).astype(np.float32),
    }

    def loss(params, _, unit):
        return (jnp.tanh(unit.rows["x"] @ params["a"]) @ params["b"]).sum()

    return loss, params, {"x": rng.standard_normal((16, 5)).astype(np.float32)}


def gemma_problem():
    params, rows = step_test.problem()
    return step_test.LOSS, params, {name: np.concatenate([column, column]) for name, column in rows.items()}


def released(problem, devices, size=1):
    """SHA-256 of the state after two steps of AdamW, by so many devices and units at a time."""
    loss, params, rows = problem()
    optimizer, batch = optax.adamw(1e-2), Batch.of_rows(rows, np.arange(16) < 13)
    mechanism = dp_sgd(100, 12, 16, 0.8, 0.5, 10, grid_bits=20)
    mesh = mesh_lib.make(f"data:{devices}")
    step = make_train_step(loss, optimizer, mechanism, mesh, Strategy("example_scan", size))
    state = TrainState(jax.tree.map(jnp.array, params), optimizer.init(params))
    for t in range(2):
        state, _ = step(state, {}, batch.dealt(devices), noise_keys(bytes(32), t))
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.as_dict())]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


@pytest.mark.parametrize("problem", ["small_problem", pytest.param("gemma_problem", marks=pytest.mark.slow)])
def test_released_bits_do_not_depend_on_devices(problem):
    """In a process with eight devices, because their number is fixed once."""
    code = f"from tests.privacy import exact_sum_test as t; print(*(t.released(t.{problem}, n) for n in (1, 2, 8)))"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    digests = done.stdout.split()
    assert len(digests) == 3 and len(set(digests)) == 1


def test_released_bits_do_not_depend_on_where_a_unit_stands():
    loss, params, rows = small_problem()
    order, mesh = np.random.default_rng(1).permutation(16), mesh_lib.make("data:2")
    batches = [Batch.of_rows({"x": x}, np.ones(16, bool)) for x in (rows["x"], rows["x"][order])]
    sums = [
        sharded_clipped_sum(loss, params, {}, batch, Clip(0.5), Strategy(), mesh, steps=jnp.float32(STEPS)).total
        for batch in batches
    ]
    for name in params:
        np.testing.assert_array_equal(*(total[name] for total in sums))
