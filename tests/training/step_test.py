import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from accounting.mechanism import dp_sgd
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import clipping, noise
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.optimizer import Optimization
from dpgemma.training.plan import Plan, summary
from dpgemma.training.step import TrainState, make_train_step, sharded_clipped_sum
from tests import objectives as loss_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = dataclasses.replace(
    PRESETS["tiny"], d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=40
)
LOSS = loss_lib.causal(MODEL, bos=2, dtype=jnp.float32).loss
ROW_LOSS = loss_lib.row_loss(MODEL, bos=2, dtype=jnp.float32)
GRADIENT = jax.jit(jax.grad(lambda params, row: ROW_LOSS(params, {}, row)))
MECHANISM = dp_sgd(100, 6, 8, 0.8, 0.5, 10)
KEYS = noise.noise_keys(bytes(32), 3)


def problem():
    params = decoder.init_parameters(MODEL, jax.random.key(0))
    return params, rows_of(np.random.default_rng(0).integers(4, 40, (8, 10)).astype(np.int32))


def rows_of(tokens):
    return {"tokens": tokens, "scored": np.ones(tokens.shape, bool)}


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@functools.lru_cache
def compiled(devices, mechanism, how):
    optimizer = optax.sgd(1.0)
    return optimizer, make_train_step(LOSS, optimizer, mechanism, mesh_lib.make(f"data:{devices}"), how)


def take_step(devices, mechanism=MECHANISM, mask=None, how=Strategy()):
    """(parameters before, parameters after, private values) of one SGD step with learning rate 1."""
    params, batch = problem()
    mask = np.ones(8, bool) if mask is None else mask
    optimizer, step = compiled(devices, mechanism, how)
    start = flat(params)
    state, stats = step(TrainState(params, optimizer.init(params)), {}, Batch.of_rows(batch, mask), KEYS)
    return start, flat(state.parameters), stats


@functools.lru_cache
def draws_of(shapes):
    return jax.jit(lambda keys: [noise.standard_normal(keys, i, shape) for i, shape in enumerate(shapes)])(KEYS)


def draws(params):
    return draws_of(tuple(leaf.shape for leaf in jax.tree.leaves(params)))


def expected_update(mask):
    """Clip, sum, noise, divide by the public 6: written out."""
    params, batch = problem()
    total = 0
    for i in np.flatnonzero(mask):
        g = flat(GRADIENT(params, {name: column[i] for name, column in batch.items()}))
        total = total + g * min(1, 0.5 / np.linalg.norm(g))
    return (total + 0.8 * 0.5 * flat(draws(params))) / 6


def test_an_adapting_clip_norm_is_charged_noised_and_moved_as_written_out():
    """Noise of 0.5 in all, of which the count's 6 / 20 units take so much that 0.9045 are left for the gradients."""
    mechanism = MECHANISM.replace(noise_multiplier=0.5, clip_quantile=0.7)
    params, batch = problem()
    gradients = [flat(GRADIENT(params, {name: column[i] for name, column in batch.items()})) for i in range(8)]
    norms = np.array([np.linalg.norm(g) for g in gradients])
    clip_norm = float(np.quantile(norms, 0.3))
    optimizer = optax.sgd(1.0)
    step = make_train_step(LOSS, optimizer, mechanism, mesh_lib.make("data:1"))
    start = TrainState(params, optimizer.init(params), jnp.float32(clip_norm))
    before, shapes = flat(params), [leaf.shape for leaf in jax.tree.leaves(params)]
    state, _ = step(start, {}, Batch.of_rows(batch, np.ones(8, bool)), KEYS)
    total = sum(g * min(1, clip_norm / norm) for g, norm in zip(gradients, norms, strict=True))
    left = (0.5**-2 - (0.5 / 0.3) ** 2) ** -0.5
    *on_leaves, on_count = draws_of((*shapes, ()))
    expected = (total + left * clip_norm * flat(on_leaves)) / 6
    np.testing.assert_allclose(before - flat(state.parameters), expected, atol=2e-6)
    count = np.where(norms <= clip_norm, 0.5, -0.5).sum() + 0.3 * float(on_count)
    moved = clip_norm * np.exp(-0.2 * (np.clip(count / 6 + 0.5, 0, 1) - 0.7))
    assert float(state.clip_norm) == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("drawn", [0, 1, 5, 8])
def test_update_is_clip_sum_noise_divide(devices, drawn):
    # pitfalls 2, 3, 5: a sum, divided by the public 6 however many were drawn, noise even for none.
    mask = np.arange(8) < drawn
    start, end, _ = take_step(devices, mask=mask)
    np.testing.assert_allclose(start - end, expected_update(mask), atol=2e-6)


def test_pitfall_8_noise_does_not_depend_on_devices_or_microbatches():
    updates = []
    for devices, how in [
        (1, Strategy()),
        (2, Strategy()),
        (1, Strategy("vmap", 4)),
        (2, Strategy("vmap", 2)),
    ]:
        start, end, _ = take_step(devices, how=how)
        updates.append(start - end)
    for update in updates[1:]:
        np.testing.assert_allclose(update, updates[0], atol=1e-6)
    nothing = np.zeros(8, bool)
    alone = [np.subtract(*take_step(devices, mask=nothing)[:2]) for devices in (1, 2)]
    np.testing.assert_array_equal(*alone)


def test_private_values_come_back_beside_the_state():
    mask = np.array([True, False, True, True, False, True, True, False])
    _, _, stats = take_step(2, mask=mask)
    assert ((np.asarray(stats.norms) > 0) == mask).all() and ((np.asarray(stats.losses) > 0) == mask).all()


def test_two_devices_sum_what_one_sums():
    params, batch = problem()
    sums = [
        flat(
            jax.jit(
                lambda p, b, n=n: sharded_clipped_sum(
                    LOSS, p, {}, b, MECHANISM.clip, Strategy(), mesh_lib.make(f"data:{n}")
                )
            )(params, Batch.of_rows(batch, np.ones(8, bool))).total
        )
        for n in (1, 2)
    ]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-6)


@pytest.mark.slow
def test_baseline_takes_the_same_path_without_noise_and_clipping():
    mechanism = dp_sgd(100, 8, 8, 0.0, float("inf"), 10)
    start, end, _ = take_step(2, mechanism)
    params, batch = problem()
    mean = jax.grad(lambda p: jax.vmap(ROW_LOSS, (None, None, 0))(p, {}, batch).mean())(params)
    np.testing.assert_allclose(start - end, flat(mean), atol=1e-6)


def test_the_optimizer_takes_nothing_but_a_noised_mean():
    params, _ = problem()
    optimizer = optax.sgd(1.0)
    state = TrainState(params, optimizer.init(params))
    with pytest.raises(TypeError, match="NoisedMean"):
        state.apply(optimizer, params)


def test_runs_that_differ_in_noise_share_one_program_and_each_adds_its_own():
    params, batch = problem()
    optimizer, units = optax.sgd(1.0), Batch.of_rows(batch, np.ones(8, bool))
    ends, texts = {}, {}
    for sigma in (0.0, 0.4, 0.8):
        step = make_train_step(LOSS, optimizer, MECHANISM.replace(noise_multiplier=sigma), mesh_lib.make("data:1"))
        texts[sigma] = step.lower(TrainState(params, optimizer.init(params)), {}, units, KEYS).as_text()
        ends[sigma] = flat(
            step(TrainState(jax.tree.map(jnp.array, params), optimizer.init(params)), {}, units, KEYS)[0].parameters
        )
    assert texts[0.4] == texts[0.8] != texts[0.0]
    np.testing.assert_allclose(ends[0.8] - ends[0.0], 2 * (ends[0.4] - ends[0.0]), atol=1e-6)
    assert np.abs(ends[0.4] - ends[0.0]).max() > 1e-3


def test_noise_that_is_no_number_is_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="finite"):
        MECHANISM.replace(noise_multiplier=float("nan"))
    with pytest.raises(ValueError, match="no finite noise"):
        # A sum without a bound, under a multiplier that is an argument of the program.
        unbounded = clipping.ClippedSum(jnp.zeros(3), None, sensitivity=float("inf"))
        jax.jit(lambda sigma: noise.add_gaussian_noise(unbounded, sigma, KEYS).total)(0.8)


def test_pitfall_23_the_compiled_step_holds_no_private_constant():
    # The same program serves any data set of the same public shape: only arguments differ.
    params, batch = problem()
    optimizer = optax.sgd(1.0)
    step = make_train_step(LOSS, optimizer, MECHANISM, mesh_lib.make("data:1"))
    state = TrainState(params, optimizer.init(params))
    other = rows_of(batch["tokens"] * 0 + 7)
    batches = [Batch.of_rows(batch, np.ones(8, bool)), Batch.of_rows(other, np.arange(8) < 2)]
    texts = {step.lower(state, {}, b, KEYS).as_text() for b in batches}
    assert len(texts) == 1


def test_a_plan_says_from_where_on_a_number_wraps_around():
    """A batch of 500,000 on a grid for 10^9 parameters: it holds 512 clip norms, of which 16 are for the noise."""
    optimization = Optimization("adamw", 1e-3, 0, "constant", 0.0, 10)
    for noise_multiplier, cap, bits, said in ((1.0, 500_000, 22, "exceeds 0.00099 clip norms"), (1.0, 700, 21, None)):
        mechanism = dp_sgd(10**7, cap - 100, cap, noise_multiplier, 1.0, 10, grid_bits=bits)
        plan = Plan(mechanism, (), 2.0, 1e-8, Strategy(), optimization, "data:1", 0, 1, 1, 1)
        text = summary(plan, "model", "here")
        assert said in text if said else "wraps" not in text, text
