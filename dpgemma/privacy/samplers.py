"""The generators of batches, one for every class of accounting.mechanism.sampling that a run may use: a closed
registry.

Poisson sampling takes time and memory proportional to the batch.

Formal guarantee: in every step each of the N items (units, or the rows of units that are drawn one by one) is drawn
independently with probability q, up to a relative error of about 1e-15 + 2^-64 / q in q (float64 rounding, and 64
random bits for each gap); where more than `max_batch_size` are drawn, a uniformly random subset of that size is kept.
The draw of step t is a function of (secret key, t, N, q, max_batch_size) alone and independent of every other step,
under the assumption that ChaCha20 is a pseudo-random function.
Tested by tests/privacy/poisson_test.py::test_inclusion_is_uniform, ::test_pairs_are_independent,
::test_batch_size_is_binomial, ::test_small_probabilities_are_resolved and
::test_pitfall_6_truncation_keeps_a_uniform_subset.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

from accounting.errors import InputError
from accounting.mechanism import Poisson, Sampling, TruncatedPoisson
from dpgemma.privacy import keystream

# Sums of gaps stay below 2^63, where the first count is doubled once or twice, which hardly ever happens.
_MOST_WALKED = 2**61


class Sampler(Protocol):
    """Draws the items of every step."""

    def draw(self, secret: bytes, step: int) -> np.ndarray:
        """Sorted distinct numbers of items int64 [k]: a function of the secret key, the step and public facts alone."""
        ...


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """The public facts of the sampler; the key is an argument of `draw`.

    Attributes:
      num_items: N, up to 1e12.
      sampling_probability: q in (0, 1].
      max_batch_size: truncation cap, or None.
    """

    num_items: int
    sampling_probability: float
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_items < 1 or not 0 < self.sampling_probability <= 1:
            raise ValueError(f"cannot draw from {self.num_items} items with probability {self.sampling_probability}")
        if self.num_items * self._first_count >= _MOST_WALKED:
            raise InputError(
                f"batches of about {self.num_items * self.sampling_probability:.3g} from {self.num_items:.3g} items are"
                " more than 64 bits can number: use fewer units, or smaller batches"
            )

    @property
    def _first_count(self) -> int:
        """Gaps that are drawn at first: more than a batch has, nearly always."""
        mean = self.num_items * self.sampling_probability
        return math.ceil(mean + 8 * math.sqrt(mean)) + 32

    def draw(self, secret: bytes, step: int) -> np.ndarray:
        """Sorted distinct indices int64 [k] of step `step`, with k <= max_batch_size."""
        drawn = self._poisson(keystream.derive(secret, "poisson gaps"), step)
        cap = self.max_batch_size
        if cap is None or drawn.size <= cap:
            return drawn
        tickets = keystream.uniform_uint64(keystream.derive(secret, "poisson truncation"), step, drawn.size)
        return np.sort(drawn[np.argpartition(tickets, cap)[:cap]])

    def _poisson(self, key: bytes, step: int) -> np.ndarray:
        """Walks over the items in geometric gaps: P[gap > k] = (1 - q)^k (Devroye 1986, chapter X.2)."""
        if self.sampling_probability == 1:
            return np.arange(self.num_items)
        count = self._first_count
        while True:
            gaps = geometric_gaps(keystream.uniform_uint64(key, step, count), self.sampling_probability)
            # A gap beyond the data ends the walk wherever it is; the bound keeps the running sum inside 64 bits.
            positions = np.cumsum(np.minimum(gaps, self.num_items).astype(np.int64) + 1) - 1
            if positions[-1] >= self.num_items:
                return positions[: np.searchsorted(positions, self.num_items)]
            count *= 2


def geometric_gaps(words: np.ndarray, probability: float) -> np.ndarray:
    """Numbers of items that are passed over before each drawn one, float64 [n], from random words uint64 [n].

    U = (word + 1/2) / 2^64 is taken from its nearer end, 0 or 1: so that long gaps, and the short ones that a small
    probability depends on, are resolved by all 64 bits.
    """
    near_zero = np.log((words.astype(np.float64) + 0.5) * 2.0**-64)
    near_one = np.log1p(-((~words).astype(np.float64) + 0.5) * 2.0**-64)
    logarithm = np.where(words < np.uint64(2**63), near_zero, near_one)
    gaps: np.ndarray = np.floor(logarithm / math.log1p(-probability))
    return gaps


def sampler_of(sampling: Sampling) -> Sampler:
    """The generator of a run's batches.

    >>> sampler = sampler_of(TruncatedPoisson(num_units=1000, expected_batch_size=10, cap=20))
    >>> units = sampler.draw(bytes(32), step=0)
    >>> len(units) <= 20, bool((np.diff(units) > 0).all())
    (True, True)

    Raises:
      InputError: a way of forming batches that is there to be accounted for only.
    """
    if type(sampling) in (Poisson, TruncatedPoisson):
        return PoissonSampler(sampling.num_items, sampling.sampling_probability, sampling.max_batch_size)
    raise InputError(f"{sampling.scheme} batches can be accounted for, but not drawn: use Poisson sampling")
