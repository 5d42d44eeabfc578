"""What is released of an exact sum: whole numbers plus whole numbers, which tell nothing by their low bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accounting.mechanism import dp_sgd, grid
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import integer_noise
from dpgemma.privacy.clipping import ClippedSum, PrivateStats
from dpgemma.privacy.noise import add_gaussian_noise, noise_keys, release_on_grid
from dpgemma.privacy.noisers import noiser_of

NOBODY = PrivateStats(jnp.zeros(1), jnp.zeros(1))
NOISE, COORDINATES = 50.0, 2000
BITS = 20
STEPS = grid.sensitivity_steps(BITS, NOISE)


@jax.jit
def in_floats(total, keys):
    return add_gaussian_noise(ClippedSum(total, NOBODY, sensitivity=1.0), NOISE, keys).total


@jax.jit
def on_grid(total, keys):
    return release_on_grid(ClippedSum(total, NOBODY, sensitivity=1.0, steps=STEPS), BITS, keys).total


def possible(released, total):
    """For how many coordinates some float32 number n gives total + 50 n = released, in float32 arithmetic."""
    n = ((released.astype(np.float64) - total) / NOISE).astype(np.float32)
    found = np.zeros(n.shape, bool)
    for away in range(-4, 5):
        near = (n.view(np.int32) + away).view(np.float32)
        found |= total.astype(np.float32) + np.float32(NOISE) * near == released
    return found.sum()


def guessed_right(release, tries, to_grid):
    """How often the sum is told from that of a neighbour by which float32 noise could have led to the release."""
    rng, right = np.random.default_rng(1), 0
    for t in range(tries):
        one = rng.standard_normal(COORDINATES) * 0.05
        two = one + rng.standard_normal(COORDINATES) / np.sqrt(COORDINATES) * 0.99
        sums = [np.trunc(x * STEPS).astype(np.int32) if to_grid else x.astype(np.float32) for x in (one, two)]
        truth = int(rng.integers(2))
        released = np.asarray(release(sums[truth], noise_keys(bytes(32), t)))
        known = [x / STEPS if to_grid else x for x in sums]
        scores = [possible(released, np.float32(x)) for x in known]
        guess = int(scores[1] > scores[0]) if scores[0] != scores[1] else int(rng.integers(2))
        right += guess == truth
    return right


def test_released_bits_cannot_tell_on_which_lattice_a_sum_lay():
    """Noise of 50 allows an advantage of 0.008; a float release gives everything away (Mironov 2012).

    400 fair guesses are outside of 151 ... 249 with a probability below 1e-6.
    """
    assert guessed_right(in_floats, 20, to_grid=False) == 20
    assert 151 <= guessed_right(on_grid, 400, to_grid=True) <= 249


def test_the_release_is_the_noised_whole_number_as_a_float():
    total = np.random.default_rng(0).integers(-(2**28), 2**28, (3, 500)).astype(np.int32)
    keys = noise_keys(bytes(32), 5)
    mechanism = dp_sgd(1000, 10, 20, NOISE, 0.3, 5, grid_bits=BITS)
    noiser = noiser_of(mechanism)
    clipped = ClippedSum({"a": total, "b": total[0]}, NOBODY, sensitivity=0.3, steps=noiser.steps(NOISE))
    noised, _ = noiser.add(clipped, (), keys, NOISE)
    for index, name in enumerate(("a", "b")):
        whole = np.asarray(integer_noise.add(clipped.total[name], keys, index, BITS))
        expected = whole.astype(np.float32) * np.float32(0.3 / STEPS)
        np.testing.assert_allclose(noised.total[name], expected, rtol=2e-7)


def test_the_noise_is_not_below_what_is_charged():
    """10^6 draws: the deviation is 50 times the sensitivity, plus a share of SHORTFALL, within 5 standard errors."""
    total = jnp.zeros(10**6, jnp.int32)
    noised = np.asarray(on_grid(total, noise_keys(bytes(32), 1)), float)
    assert noised.std() == pytest.approx(NOISE / (1 - grid.SHORTFALL), rel=5 / np.sqrt(2e6))


def test_a_count_is_noised_in_whole_numbers():
    steps = grid.sensitivity_steps(BITS, 1.0)

    @jax.jit
    def release(keys):
        clipped = ClippedSum(jnp.zeros(1, jnp.int32), NOBODY, sensitivity=1.0, count=jnp.int32(-14), steps=steps)
        return release_on_grid(clipped, BITS, keys, count_noise=0.8).count

    counts = np.array([float(release(noise_keys(bytes(32), t))) for t in range(2000)])
    assert counts.mean() == pytest.approx(-7, abs=5 * 0.8 / np.sqrt(2000))
    assert counts.std() == pytest.approx(0.8, rel=5 / np.sqrt(4000))


def test_no_two_numbers_share_their_noise():
    """Over all arrays of a model, all layers of those that are stacked, and several steps; nor do they share its size.

    60,000 numbers of a standard deviation of 2^26 have 16 coincidences of their sizes on average, and 70 of them by
    chance with a probability below 1e-20; anything that is shared makes thousands.
    """
    leaves = jax.tree.leaves(decoder.parameter_shapes(PRESETS["ladder_20k"]))
    assert any(leaf.ndim == 3 for leaf in leaves)
    steps = grid.sensitivity_steps(grid.LAW_BITS, 1.0)
    zeros = ClippedSum([jnp.zeros(leaf.shape, jnp.int32) for leaf in leaves], NOBODY, sensitivity=steps, steps=steps)
    run = jax.jit(lambda keys: [integer_noise.add(x, keys, i, grid.LAW_BITS) for i, x in enumerate(zeros.total)])
    noise = [np.abs(np.asarray(x, np.int64)).ravel() for step in range(3) for x in run(noise_keys(bytes(32), step))]
    sizes = np.concatenate([x for x in noise if x.size > 1])
    assert sizes.size > 60_000
    assert sizes.size - np.unique(sizes).size < 70
    # The release itself adds just this.
    released = jax.tree.leaves(release_on_grid(zeros, grid.LAW_BITS, noise_keys(bytes(32), 2)).total)
    last = np.concatenate([np.abs(np.asarray(x)).ravel() for x in released])
    np.testing.assert_array_equal(last, np.concatenate(noise[-len(leaves) :]).astype(np.float32))


def test_floats_and_whole_numbers_are_not_mixed():
    on_a_grid = ClippedSum(jnp.zeros(3, jnp.int32), NOBODY, sensitivity=1.0, steps=STEPS)
    floats = ClippedSum(jnp.zeros(3), NOBODY, sensitivity=1.0)
    with pytest.raises(TypeError, match="release_on_grid"):
        add_gaussian_noise(on_a_grid, 1.0, noise_keys(bytes(32), 0))
    with pytest.raises(TypeError, match="on a grid"):
        release_on_grid(floats, BITS, noise_keys(bytes(32), 0))
    with pytest.raises(ValueError, match="count_noise"):
        release_on_grid(on_a_grid, BITS, noise_keys(bytes(32), 0), count_noise=1.0)


def test_noise_that_was_made_for_another_grid_is_refused():
    noiser = noiser_of(dp_sgd(1000, 10, 20, NOISE, 1.0, 5, grid_bits=BITS))
    clipped = ClippedSum(jnp.zeros(3, jnp.int32), NOBODY, sensitivity=1.0, steps=2 * noiser.steps(NOISE))
    with pytest.raises(ValueError, match="made for"):
        noiser.add(clipped, (), noise_keys(bytes(32), 0), NOISE)
