import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import stats

from dpgemma.privacy import clipping, noise

SECRET = bytes(range(32))


def clipped(shape, sensitivity=1.0, leaves=1):
    total = {str(i): jnp.zeros(shape) for i in range(leaves)}
    return clipping.ClippedSum(total, clipping.PrivateStats(jnp.zeros(1), jnp.zeros(1)), sensitivity)


def draw(step, shape=(1_000_000,), sigma=1.0, sensitivity=1.0):
    return np.asarray(
        noise.add_gaussian_noise(clipped(shape, sensitivity), sigma, noise.noise_keys(SECRET, step)).total["0"],
        np.float64,
    )


def test_pitfall_13_noise_is_gaussian_to_the_tails():
    # pitfall 13. Fixed seed; each check is passed by a true Gaussian with probability above 1 - 1e-6.
    samples = np.concatenate([draw(step, (4_000_000,)) for step in range(5)])
    n = samples.size
    assert stats.kstest(samples, "norm").pvalue > 1e-6
    assert abs(samples.mean()) < 5 / np.sqrt(n)
    assert abs(samples.var() - 1) < 5 * np.sqrt(2 / n)
    for threshold in (3.0, 4.0, 5.0, 5.2):
        expected = 2 * n * stats.norm.sf(threshold)
        count = (np.abs(samples) > threshold).sum()
        assert stats.poisson.sf(count - 1, expected) > 1e-7 and stats.poisson.cdf(count, expected) > 1e-7
    # pitfall 12: bfloat16 noise would have 128 values.
    assert len(np.unique(samples[:4_000_000].astype(np.float32))) > 2**20


@pytest.mark.slow
def test_noise_reaches_beyond_a_single_float32_normal():
    # One float32 normal ends near 5.4; the sum of four can reach twice that. Probability of failing is below 1e-6.
    largest = max(
        float(jnp.abs(noise.standard_normal(noise.noise_keys(SECRET, s), 0, (20_000_000,))).max()) for s in range(6)
    )
    assert largest > 5.45


def test_scale_is_noise_multiplier_times_sensitivity():
    samples = draw(0, sigma=0.7, sensitivity=3.0)
    assert samples.std() == pytest.approx(2.1, rel=5e-3)


def test_pitfall_20_every_leaf_and_coordinate_is_noised():
    # pitfall 21 too: coordinates whose clipped sum is zero get noise like any other.
    noised = noise.add_gaussian_noise(clipped((500, 20), leaves=3), 1.0, noise.noise_keys(SECRET, 0)).total
    assert all((np.asarray(leaf) != 0).all() for leaf in noised.values())
    flat = [np.asarray(leaf).ravel() for leaf in noised.values()]
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.06


def test_steps_are_independent_and_reproducible():
    a, again, b = draw(3), draw(3), draw(4)
    np.testing.assert_array_equal(a, again)
    assert abs(np.corrcoef(a, b)[0, 1]) < 6e-3


def test_keys_depend_on_secret_and_step_and_are_distinct():
    keys = {tuple(row) for step in range(200) for row in noise.noise_keys(SECRET, step)}
    assert len(keys) == 1000
    assert not np.array_equal(noise.noise_keys(SECRET, 0), noise.noise_keys(SECRET[::-1], 0))
    with pytest.raises(ValueError, match="128 bits"):
        noise.noise_keys(b"short", 0)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")])
def test_pitfall_7_two_devices_give_the_same_noise_bits(spec):
    # pitfall 7: one global noise tree, whatever the devices.
    keys = noise.noise_keys(SECRET, 9)

    def sample(keys):
        return noise.add_gaussian_noise(clipped((64, 48)), 1.3, keys).total["0"]

    results = []
    for count in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        results.append(np.asarray(jax.jit(sample, out_shardings=NamedSharding(mesh, spec))(keys)))
    np.testing.assert_array_equal(results[0].view(np.uint32), results[1].view(np.uint32))


def test_pitfall_27_order_of_clipping_noise_and_division_is_enforced():
    total = {"0": jnp.zeros(3)}
    keys = noise.noise_keys(SECRET, 0)
    with pytest.raises(TypeError):
        noise.add_gaussian_noise(total, 1.0, keys)
    with pytest.raises(TypeError):
        noise.divide(clipped((3,)), 2.0)
    noised = noise.add_gaussian_noise(clipped((3,)), 1.0, keys)
    with pytest.raises(TypeError):
        noise.add_gaussian_noise(noised, 1.0, keys)
    np.testing.assert_allclose(noise.divide(noised, 4.0).mean["0"], noised.total["0"] / 4)


def test_unbounded_sensitivity_takes_no_noise():
    with pytest.raises(ValueError, match="no finite noise"):
        noise.add_gaussian_noise(clipped((3,), sensitivity=float("inf")), 1.0, noise.noise_keys(SECRET, 0))
