"""A clip norm that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871).

Formal guarantee: a step releases the sum of gradients divided by C and clipped to 1, with noise of
`Mechanism.gradient_noise_multiplier`, and how many units had a norm of at most C, each counted as +1/2 or -1/2 and an
empty one as 0, with noise of standard deviation `Mechanism.count_noise`. Both together are one Gaussian mechanism with
the step's whole noise multiplier, which is what the accountant charges, for an absent unit and for one that an empty
unit replaces; the next C is a function of this release. Tested by tests/privacy/adaptive_test.py::
test_both_releases_together_are_the_mechanism_that_is_charged and
test_an_empty_unit_in_place_of_one_moves_the_count_by_a_half.
"""

import jax
import jax.numpy as jnp

from accounting.mechanism.clip import LEARNING_RATE, Clip
from dpgemma.privacy.clipping import SMALLEST_CLIP_NORM

LARGEST_CLIP_NORM = 1e6


def start(clip: Clip) -> jax.Array | None:
    """The first C as part of a run's state; None where C stays."""
    return jnp.float32(clip.norm) if clip.adapts else None


def following(clip: Clip, norm: jax.Array, count: jax.Array, expected_batch_size: float) -> jax.Array:
    """The next C, from the noised count of halves: C exp(-eta (share - quantile)), within what float32 can square."""
    assert clip.quantile is not None
    share = jnp.clip(count / expected_batch_size + 0.5, 0.0, 1.0)
    return jnp.clip(norm * jnp.exp(-LEARNING_RATE * (share - clip.quantile)), SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM)
