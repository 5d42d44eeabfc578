"""Gaussian noise on a clipped sum, once, from a secret key.

Formal guarantee: noise goes on every coordinate of a ClippedSum, zero coordinates included, independent in each; that
of step t is a function of (secret key, t) alone, whatever the devices that compute it. Independence rests on
Threefry-2x32 under five 64-bit keys per step, taken from a 256-bit secret by BLAKE2b.

`release_on_grid` adds whole numbers to the whole numbers of an exact sum, and turns them into floats afterwards. So
what leaves it is a function of (sum + noise) modulo 2^32, where neighbouring sums are at most `steps` apart and the
noise has the law of integer_noise: the bits that leave are as private as accounting.mechanism charges.

`add_gaussian_noise` is for comparison: it adds float32 samples of standard deviation noise_multiplier * sensitivity to
float32 sums, and their low bits can tell neighbours apart (Mironov 2012, doi 10.1145/2382196.2382264). A sample is the
scaled sum of four normals, because one float32 normal ends at 5.4 standard deviations.
Tested by tests/privacy/exact_release_test.py::test_released_bits_cannot_tell_on_which_lattice_a_sum_lay,
tests/privacy/noise_test.py::test_pitfall_13_noise_is_gaussian_to_the_tails and
::test_pitfall_7_two_devices_give_the_same_noise_bits.
"""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accounting.mechanism import grid
from accounting.mechanism.clip import COUNT_SENSITIVITY
from dpgemma.privacy import integer_noise
from dpgemma.privacy.clipping import ClippedSum
from dpgemma.privacy.integer_noise import DRAWS, InShards

# Fineness of the noise on a count: 2^25 steps leave room for a million units.
_COUNT_BITS = 25


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
    """Key data uint32 [5, 2] of the Threefry keys of one step; float32 noise uses the first four.

    >>> noise_keys(bytes(32), step=0).shape
    (5, 2)

    Args:
      secret: at least 128 bits from the operating system.
      step: number of the update, from 0.
    """
    if len(secret) < 16:
        raise ValueError("a noise key needs at least 128 bits")

    def keys(count: int, purpose: bytes) -> np.ndarray:
        digest = hashlib.blake2b(step.to_bytes(8, "little"), key=secret, digest_size=8 * count, person=purpose)
        return np.frombuffer(digest.digest(), dtype="<u4").astype(np.uint32).reshape(count, 2)

    return np.concatenate([keys(DRAWS, b"dpgemma noise"), keys(1, b"dpgemma fill")])


def standard_normal(key_data: Any, leaf_index: int, shape: tuple[int, ...]) -> Any:
    """float32 standard normals for one leaf: (n_1 + n_2 + n_3 + n_4) / 2 from four independent keys."""

    def add_draw(total: Any, data: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), leaf_index)
        return total + jax.random.normal(key, shape, jnp.float32), None

    # A loop, so that a program with many leaves holds the generator once for each and not four times.
    return jax.lax.scan(add_draw, jnp.zeros(shape), jnp.asarray(key_data)[:DRAWS])[0] * DRAWS**-0.5


def release_on_grid(
    clipped: ClippedSum,
    bits: int,
    key_data: Any,
    count_noise: float | None = None,
    in_shards: InShards | None = None,
) -> NoisedSum:
    """The noised sum of an exact one, in float32.

    >>> from dpgemma.privacy.clipping import PrivateStats
    >>> steps = grid.sensitivity_steps(20, noise_multiplier=1.1)
    >>> empty = PrivateStats(jnp.zeros(1), jnp.zeros(1))
    >>> clipped = ClippedSum(jnp.zeros(10_000, jnp.int32), empty, sensitivity=0.5, steps=steps)
    >>> noised = release_on_grid(clipped, 20, noise_keys(bytes(32), step=0))
    >>> 0.5 < float(noised.total.std()) < 0.6  # 1.1 * 0.5
    True

    Args:
      bits: of the grid; clipped.steps is grid.sensitivity_steps(bits, noise multiplier).
      count_noise: standard deviation of the noise on a sum's count, in units; must be given for a sum that has one.
      in_shards: how the sum is spread over devices; the bits do not depend on it.

    Raises:
      TypeError: the argument is no ClippedSum on a grid.
      ValueError: a count without its noise, or the reverse.
    """
    if not isinstance(clipped, ClippedSum) or clipped.steps is None:
        raise TypeError(f"exact noise goes on a ClippedSum on a grid, got {type(clipped).__name__}")
    _check_count(clipped, count_noise)
    leaves, structure = jax.tree.flatten(clipped.total)
    step = clipped.sensitivity / clipped.steps
    sums = [integer_noise.add(leaf, key_data, i, bits, in_shards) for i, leaf in enumerate(leaves)]
    noised = [leaf.astype(jnp.float32) * step for leaf in sums]
    count = None
    if clipped.count is not None:
        assert count_noise is not None
        # How many steps a half is: rounded down, so that the noise is never below what is charged.
        half = math.floor(grid.sensitivity_steps(_COUNT_BITS, count_noise / COUNT_SENSITIVITY))
        counted = integer_noise.add(clipped.count * half, key_data, len(leaves), _COUNT_BITS)
        count = counted.astype(jnp.float32) * (COUNT_SENSITIVITY / half)
    return NoisedSum(jax.tree.unflatten(structure, noised), count)


def _check_count(clipped: ClippedSum, count_noise: float | None) -> None:
    if (clipped.count is None) != (count_noise is None):
        raise ValueError("a sum with a count needs count_noise, and only such a sum")
    if count_noise is not None and not 0 < count_noise < float("inf"):
        raise ValueError(f"count_noise must be positive and finite, got {count_noise:g}")


def add_gaussian_noise(
    clipped: ClippedSum, noise_multiplier: float, key_data: Any, count_noise: float | None = None
) -> NoisedSum:
    """Adds float32 N(0, (noise_multiplier * sensitivity)^2) to every coordinate of a float32 sum; nothing where
    noise_multiplier is zero (no privacy).

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
    if clipped.steps is not None:
        raise TypeError("a ClippedSum on a grid is released by release_on_grid: float noise would undo its exactness")
    traced = isinstance(noise_multiplier, jax.core.Tracer)
    if not traced and noise_multiplier == 0 and (clipped.count is None) == (count_noise is None):
        return NoisedSum(clipped.total, clipped.count)
    _check_count(clipped, count_noise)
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
