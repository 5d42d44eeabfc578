"""What an epsilon means: attacks that a run withstands, derived from delta at many epsilons.

A mechanism is (epsilon, delta(epsilon))-differentially private for every epsilon at once. Whoever tells two
neighbouring data sets apart with a false-positive rate alpha therefore misses at a rate of at least

    f(alpha) = max over epsilon of max(0, 1 - delta - e^epsilon alpha, e^-epsilon (1 - delta - alpha))

(Wasserman and Zhou 2010; Dong, Roth and Su 2022, arXiv 1905.02383, proposition 2.12). With finitely many epsilons, and
upper bounds of delta, f is a lower bound of the true trade-off curve, so everything below is on the safe side. Tested
by tests/accounting/conversions_test.py::test_no_likelihood_ratio_attack_beats_the_tradeoff_curve.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import special

from accounting.accountant import Accountant

FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2, 0.1)
# How often somebody guesses right who knows nothing but what is likely.
PRIORS = (0.01, 0.1, 0.5)
_LARGEST_MU = 1e6


@dataclasses.dataclass(frozen=True)
class PrivacyProfile:
    """Upper bounds of delta at ascending epsilons, the first of them 0.

    Attributes:
      epsilons, deltas: arrays [n].
    """

    epsilons: np.ndarray
    deltas: np.ndarray

    def delta(self, epsilon: float) -> float:
        """An upper bound of delta at `epsilon` >= 0: that of the nearest known epsilon below it."""
        return float(self.deltas[np.searchsorted(self.epsilons, epsilon, side="right") - 1])

    def tradeoff(self, false_positive_rates: Any) -> np.ndarray:
        """Lower bounds of the false-negative rate at each false-positive rate in [0, 1]."""
        alpha = np.asarray(false_positive_rates, dtype=float)[:, None]
        kept = 1 - self.deltas
        with np.errstate(over="ignore"):
            lines = np.maximum(kept - np.exp(self.epsilons) * alpha, np.exp(-self.epsilons) * (kept - alpha))
        return np.maximum(lines.max(axis=1), 0.0)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most that any membership attack detects at this false-positive rate."""
        return float(1 - self.tradeoff([false_positive_rate])[0])

    @property
    def membership_advantage(self) -> float:
        """Largest true-positive minus false-positive rate of any attack: the total variation, delta at epsilon 0."""
        return float(self.deltas[0])

    def gaussian_mu(self, smallest_delta: float) -> float:
        """mu of a Gaussian mechanism that is nowhere more private, as far as `smallest_delta` reaches.

        At every epsilon from 0 to the one where delta falls to `smallest_delta`, N(0, 1) against N(mu, 1) has at least
        the delta of this mechanism. Further out a subsampled mechanism resembles no Gaussian.

        Returns:
          mu; inf where no finite one is large enough.
        """
        # Between two known epsilons delta is at most the left one's, and the Gaussian's at least the right one's.
        known = np.flatnonzero(self.deltas[:-1] >= smallest_delta)
        left, right = self.deltas[known], self.epsilons[known + 1]

        def covers(mu: Any) -> Any:
            return bool(np.all(gaussian_delta(right, mu) >= left))

        low, high = 0.0, 1.0
        while not covers(high):
            low, high = high, 2 * high
            if high > _LARGEST_MU:
                return math.inf
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if covers(middle) else (middle, high)
        return high


def gaussian_delta(epsilons: float | np.ndarray, mu: float) -> np.ndarray:
    """delta of N(mu, 1) against N(0, 1) at each epsilon, mu > 0 (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    epsilon = np.asarray(epsilons, dtype=float)
    return np.maximum(
        special.ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)), 0.0
    )


def profile(accountant: Accountant, delta: float, epsilon: float, points: int = 1000) -> PrivacyProfile:
    """The profile of an accountant's mechanisms, up to a little beyond `epsilon`, the one that goes with `delta`."""
    reach = 1.25 * epsilon if math.isfinite(epsilon) and epsilon > 0 else 1.0
    # Ends at the very epsilon of the report too, where delta is known best.
    epsilons = np.unique(np.append(np.linspace(0.0, reach, points), epsilon if math.isfinite(epsilon) else 0.0))
    return PrivacyProfile(epsilons, accountant.deltas(epsilons, delta))
