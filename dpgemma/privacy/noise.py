"""Gaussian noise on a clipped sum, once, from a secret key.

Formal guarantee: `add_gaussian_noise` adds to every coordinate of a ClippedSum, zero coordinates included, an
independent sample of standard deviation noise_multiplier * sensitivity. The noise of step t is a function of (secret
key, t) alone, whatever the devices that compute it. Independence rests on Threefry-2x32 under four independent 64-bit
keys per step, taken from a 256-bit secret by BLAKE2b; a sample is the scaled sum of four normals, because one float32
normal ends at 5.4 standard deviations, where a delta of 1e-10 still has mass, and because four keys make 256 bits.
Tested by tests/privacy/noise_test.py::test_pitfall_13_noise_is_gaussian_to_the_tails and
::test_pitfall_7_two_devices_give_the_same_noise_bits.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.privacy.clipping import ClippedSum

DRAWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisedSum:
    """A clipped sum after noise: safe to release as far as the accountant's epsilon says. `count` as in ClippedSum,
    noised.
    """

    total: Any
    count: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisedMean:
    """A noised sum divided by a public constant. The only gradient that an optimizer step takes."""

    mean: Any


def noise_keys(secret: bytes, step: int) -> np.ndarray:
    """Key data uint32 [4, 2] of the four Threefry keys of one step.

    >>> noise_keys(bytes(32), step=0).shape
    (4, 2)

    Args:
      secret: at least 128 bits from the operating system.
      step: number of the update, from 0.
    """
    if len(secret) < 16:
        raise ValueError("a noise key needs at least 128 bits")
    digest = hashlib.blake2b(step.to_bytes(8, "little"), key=secret, digest_size=8 * DRAWS, person=b"dpgemma noise")
    return np.frombuffer(digest.digest(), dtype="<u4").astype(np.uint32).reshape(DRAWS, 2)


def standard_normal(key_data: Any, leaf_index: int, shape: tuple[int, ...]) -> Any:
    """float32 standard normals for one leaf: (n_1 + n_2 + n_3 + n_4) / 2 from four independent keys."""

    def add_draw(total: Any, data: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), leaf_index)
        return total + jax.random.normal(key, shape, jnp.float32), None

    # A loop, so that a program with many leaves holds the generator once for each and not four times.
    return jax.lax.scan(add_draw, jnp.zeros(shape), jnp.asarray(key_data))[0] * DRAWS**-0.5


def add_gaussian_noise(
    clipped: ClippedSum, noise_multiplier: float, key_data: Any, count_noise: float | None = None
) -> NoisedSum:
    """Adds N(0, (noise_multiplier * sensitivity)^2) to every coordinate; nothing where noise_multiplier is zero (no
    privacy).

    >>> from dpgemma.privacy.clipping import PrivateStats
    >>> clipped = ClippedSum(jnp.zeros(10_000), PrivateStats(jnp.zeros(1), jnp.zeros(1)), sensitivity=0.5)
    >>> noised = add_gaussian_noise(clipped, 1.1, noise_keys(bytes(32), step=0))
    >>> 0.5 < float(noised.total.std()) < 0.6  # 1.1 * 0.5
    True

    Args:
      noise_multiplier: a number; or a traced one, so that one compiled program serves any noise, whose caller has
        checked that it is positive and finite.
      count_noise: standard deviation of the noise on a sum's count; must be given for a sum that has one.

    Raises:
      TypeError: the argument is no ClippedSum: its sensitivity would be unknown.
      ValueError: noise was asked for a sum of unbounded sensitivity, or none for a count.
    """
    if not isinstance(clipped, ClippedSum):
        raise TypeError(f"noise goes on a ClippedSum, got {type(clipped).__name__}")
    if (clipped.count is None) != (count_noise is None):
        raise ValueError("a sum with a count needs count_noise, and only such a sum")
    traced = isinstance(noise_multiplier, jax.core.Tracer)
    if not traced and noise_multiplier == 0:
        return NoisedSum(clipped.total, clipped.count)
    if count_noise is not None and not 0 < count_noise < float("inf"):
        raise ValueError(f"count_noise must be positive and finite, got {count_noise:g}")
    scale = noise_multiplier * clipped.sensitivity
    if not (0 < clipped.sensitivity < float("inf") if traced else 0 < scale < float("inf")):
        raise ValueError(
            f"noise multiplier {noise_multiplier} and sensitivity {clipped.sensitivity:g} give no finite noise"
        )
    leaves, structure = jax.tree.flatten(clipped.total)
    noised = [leaf + scale * standard_normal(key_data, i, leaf.shape) for i, leaf in enumerate(leaves)]
    count = None if clipped.count is None else clipped.count + count_noise * standard_normal(key_data, len(leaves), ())
    return NoisedSum(jax.tree.unflatten(structure, noised), count)


def divide(noised: NoisedSum, expected_batch_size: float) -> NoisedMean:
    """The mean gradient: divided by the public expected batch size, never by the batch that was drawn.

    >>> divide(NoisedSum(jnp.array([8.0])), expected_batch_size=4).mean.tolist()
    [2.0]

    Raises:
      TypeError: the argument is no NoisedSum.
    """
    if not isinstance(noised, NoisedSum):
        raise TypeError(f"only a NoisedSum may be divided, got {type(noised).__name__}")
    return NoisedMean(jax.tree.map(lambda leaf: leaf / expected_batch_size, noised.total))


def scale(mean: NoisedMean, factor: Any) -> NoisedMean:
    """A mean times a number that was released before."""
    return NoisedMean(jax.tree.map(lambda leaf: leaf * factor, mean.mean))
