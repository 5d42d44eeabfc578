"""A clip norm that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871).

Formal guarantee: a step releases the sum of gradients divided by C and clipped to 1, with noise of
`gradient_noise_multiplier`, and how many units had a norm of at most C, each counted as +1/2 or -1/2 and an empty one
as 0, with noise of standard deviation `count_noise`. Both together are one Gaussian mechanism with the step's whole
noise multiplier, which is what the accountant charges, for an absent unit and for one that an empty unit replaces; the
next C is a function of this release. Tested by tests/privacy/adaptive_test.py::
test_both_releases_together_are_the_mechanism_that_is_charged and
test_an_empty_unit_in_place_of_one_moves_the_count_by_a_half.
"""

import dataclasses

import jax.numpy as jnp

from dpgemma.privacy.clipping import SMALLEST_CLIP_NORM

COUNT_SENSITIVITY = 0.5
# The published choices (section 2.1 and 3.2 of the paper): the step on a logarithmic scale, and noise of a twentieth of
# the batch.
LEARNING_RATE = 0.2
COUNT_NOISE = 1 / 20
LARGEST_CLIP_NORM = 1e6


@dataclasses.dataclass(frozen=True)
class AdaptiveClipping:
    """How C moves.

    Attributes:
      quantile: share of the units whose norm shall be at most C.
      noise_multiplier: of the whole step.
      expected_batch_size: public divisor of the count.
      learning_rate: eta in C <- C exp(-eta (share - quantile)).
    """

    quantile: float
    noise_multiplier: float
    expected_batch_size: float
    learning_rate: float = LEARNING_RATE

    def __post_init__(self):
        if not 0 < self.quantile < 1:
            raise ValueError(f"the quantile must lie between 0 and 1, got {self.quantile:g}")
        if self.noise_multiplier * COUNT_SENSITIVITY >= self.count_noise > 0:
            raise ValueError(
                f"a noise multiplier of {self.noise_multiplier:g} leaves nothing for the gradients at batch"
                f" {self.expected_batch_size:g}: the count's noise of {self.count_noise:g} units must exceed half of it"
            )

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count, in units; none where nothing is noised."""
        return self.expected_batch_size * COUNT_NOISE if self.noise_multiplier > 0 else 0.0

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise on the gradients so that both releases cost what `noise_multiplier` alone would (theorem 1 of the
        paper).
        """
        if self.noise_multiplier == 0:
            return 0.0
        return (self.noise_multiplier**-2 - (COUNT_SENSITIVITY / self.count_noise) ** 2) ** -0.5

    def update(self, clip_norm, count):
        """The next clip norm from the noised count of halves; it stays where float32 squares do."""
        share = jnp.clip(count / self.expected_batch_size + 0.5, 0.0, 1.0)
        return jnp.clip(
            clip_norm * jnp.exp(-self.learning_rate * (share - self.quantile)), SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM
        )
