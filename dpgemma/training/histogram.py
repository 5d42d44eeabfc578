"""The release of a histogram: how many units answer each of some public prompts, under noise.

Counts and noise are whole numbers; a unit contributes `unit_steps(noise)` of them (accounting.mechanism.histogram),
rounded down, so that the noise is never below what is charged.

Formal guarantee: what is released is a function of (counts + noise), where the counts of data sets that differ in one
unit are at most one unit apart in L1, and so in L2 (data.text.prompts.counted), and the noise has the law of
privacy.integer_noise with a standard deviation of `noise` units on every count, from a key that no step and no other
run has. It is accounting.mechanism.histogram. Tested by
tests/training/histogram_test.py::test_what_is_released_is_counts_and_noise_from_the_runs_key and
::test_the_noise_has_the_stated_deviation.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from accounting.ledger.histogram import ReleasedHistogram
from accounting.mechanism import grid
from dpgemma.privacy import integer_noise
from dpgemma.privacy.noise import noise_keys


def released(prompts: Sequence[str], counts: np.ndarray, unit: int, noise: float, key: bytes) -> ReleasedHistogram:
    """Counts under noise.

    Args:
      counts: of `counted`, with the `unit` of unit_steps(noise).
      noise: standard deviation of the noise, in units.
      key: secret, of this release alone.
    """
    nothing = jnp.zeros(len(prompts), jnp.int32)
    noised = counts + np.asarray(integer_noise.add(nothing, noise_keys(key, 0), 0, grid.LAW_BITS), np.int64)
    return ReleasedHistogram(tuple(prompts), tuple(int(value) / unit for value in noised), noise)
