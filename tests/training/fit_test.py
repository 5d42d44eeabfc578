"""Training of any model: its epsilon is the command line's, and its steps follow from keys and data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from accounting import rounding
from accounting.errors import InputError
from dpgemma.privacy.samplers import sampler_of
from dpgemma.training.fit import Keys, fit, plan
from tests.training.recomputed_test import noise_of
from tests.training.runs import call

KEYS = Keys(bytes(range(32)), bytes(range(32, 64)))
X = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
RECORDS = {"x": X, "y": (X @ np.array([1, 2, 3])).astype(np.float32)}


def squared_error(weights, record):
    return (record["x"] @ weights - record["y"]) ** 2


@pytest.mark.parametrize("given", [dict(epsilon=2.0), dict(noise_multiplier=1.3)])
def test_epsilon_is_that_of_the_command_line(given):
    facts = dict(delta=1e-5, batch_size=60, steps=25)
    fitted = fit(squared_error, jnp.zeros(3), RECORDS, **facts, **given)
    mechanism = fitted.mechanism
    flags = dict(num_units=300, max_batch_size=mechanism.max_batch_size, neighbouring_relation="zero_out", **facts)
    done = call("account", "--json", *(f"--{name}={value}" for name, value in (flags | given).items()))
    told = json.loads(done.stdout)
    assert told["noise_multiplier"] == pytest.approx(mechanism.noise_multiplier, rel=1e-6)
    assert rounding.round_up(told["epsilon"]) == fitted.epsilon
    assert "epsilon" not in given or fitted.epsilon <= given["epsilon"]


def test_steps_are_those_that_keys_and_data_say():
    """Steps of gradient descent, made again from the keys: draw, clipped gradients, noise in whole numbers."""
    fitted = fit(
        squared_error, jnp.zeros(3), RECORDS, delta=1e-5, batch_size=60, steps=3, noise_multiplier=0.8, clip_norm=0.5,
        optimizer=optax.sgd(1.0), keys=KEYS,
    )  # fmt: skip
    bits, weights = fitted.mechanism.noise.grid_bits, np.zeros(3)
    for t in range(3):
        drawn = sampler_of(fitted.mechanism.sampling).draw(KEYS.sampling, t)
        errors = X[drawn].astype(np.float64) @ weights - RECORDS["y"][drawn]
        assert fitted.losses[t] == pytest.approx((errors**2).mean(), rel=1e-5)
        gradients = 2 * errors[:, None] * X[drawn]
        clipped = gradients * np.minimum(1, 0.5 / np.linalg.norm(gradients, axis=1))[:, None]
        noise = noise_of(KEYS.noise, t, 0, (3,), bits) * 0.5 * 0.8 / (2.0**bits * (1 - 2.0**-11))
        weights = weights - (clipped.sum(axis=0) + noise) / 60
    np.testing.assert_allclose(fitted.parameters, weights, atol=5e-6)


def test_keys_are_new_for_every_run_and_the_start_stays():
    start = jnp.zeros(3)
    given = dict(delta=1e-5, batch_size=60, steps=2, noise_multiplier=1.0)
    first, second = (fit(squared_error, start, RECORDS, **given).parameters for _ in range(2))
    assert not np.array_equal(first, second) and np.array_equal(start, np.zeros(3))
    again, same = (fit(squared_error, start, RECORDS, **given, keys=KEYS, records_at_once=n).parameters for n in (1, 8))
    np.testing.assert_allclose(again, same, atol=1e-6)  # how many gradients are held changes no sum


def test_one_record_moves_the_sum_by_no_more_than_the_clip_norm():
    """Against the data set in which it is empty, under one key, whatever is in it: the runs differ by C / B at most."""
    given = dict(delta=1e-5, batch_size=60, steps=1, noise_multiplier=0.8, clip_norm=0.5, keys=KEYS)
    moved = []
    for content in (0.0, 1e20, np.nan, np.inf, -3.0, 1.0):
        changed = {name: column.copy() for name, column in RECORDS.items()}
        mechanism = plan(300, 3, delta=1e-5, batch_size=60, steps=1, noise_multiplier=0.8, clip_norm=0.5, multiple=8)
        changed["x"][sampler_of(mechanism.sampling).draw(KEYS.sampling, 0)[3]] = content
        done = fit(squared_error, jnp.zeros(3), changed, **given, optimizer=optax.sgd(1.0))
        moved.append(np.asarray(done.parameters, np.float64))
    distances = [np.linalg.norm(each - moved[0]) for each in moved[1:]]
    assert max(distances) <= 0.5 / 60 * (1 + 1e-5) and max(distances[3:]) > 0.4 / 60, distances


def test_what_cannot_be_trained_is_one_sentence():
    given = dict(delta=1e-5, batch_size=60, steps=2)
    for more, sentence in (
        (dict(), "one of `epsilon` and `noise_multiplier`"),
        (dict(epsilon=1.0, noise_multiplier=1.0), "one of `epsilon` and `noise_multiplier`"),
        (dict(epsilon=1.0, batch_size=301), "exceeds the 300 records"),
        (dict(epsilon=1e-9), "no noise reaches"),
        (dict(epsilon=np.inf), "`epsilon` must be positive and finite"),
        (dict(noise_multiplier=0.0), "`noise_multiplier` must be positive and finite"),
        (dict(epsilon=1.0, clip_norm=1e-9), "too small for float32"),
        (dict(epsilon=1.0, steps=0), "must be at least 1"),
        (dict(epsilon=1.0, delta=1e-26), "smaller than what the noise can hide"),
    ):
        with pytest.raises(InputError, match=sentence):
            fit(squared_error, jnp.zeros(3), RECORDS, **given | more)
    with pytest.raises(InputError, match="one row for each record"):
        fit(squared_error, jnp.zeros(3), {"x": X, "y": X[:5, 0]}, **given, epsilon=1.0)
    with pytest.raises(InputError):
        plan(100, 3, delta=2.0, batch_size=10, steps=2, epsilon=1.0)


def test_trees_of_several_arrays_are_trained():
    def loss(parameters, record):
        return (record["x"] @ parameters["w"] + parameters["b"] - record["y"]) ** 2

    fitted = fit(
        loss, {"w": jnp.zeros(3), "b": jnp.zeros(())}, RECORDS, delta=1e-5, batch_size=100, steps=60, epsilon=20.0,
        optimizer=optax.adam(0.2),
    )  # fmt: skip
    assert jax.tree.structure(fitted.parameters) == jax.tree.structure({"w": 0, "b": 0})
    np.testing.assert_allclose(fitted.parameters["w"], [1, 2, 3], atol=0.6)


def test_units_whose_losses_are_all_no_numbers_add_nothing_to_the_noise():
    given = dict(delta=1e-5, batch_size=60, steps=3, noise_multiplier=0.8, keys=KEYS)
    bad, none = (
        fit(lambda weights, record, factor=factor: factor * weights.sum(), jnp.ones(3), RECORDS, **given)
        for factor in (np.nan, 0.0)
    )
    np.testing.assert_array_equal(bad.parameters, none.parameters)
    assert np.isfinite(bad.parameters).all() and not np.array_equal(bad.parameters, np.ones(3))
