"""The lower bound of epsilon of a Gaussian mechanism, from real-valued scores of canaries in one run.

Formal guarantee: let the scores be independent, those of the held-out canaries draws of N(a, s^2) and those of the
included ones draws of N(a + mu s, s^2), with any a and s, and mu >= 0. Then P[`mu` exceeds mu] is at most the
significance, for any numbers of canaries. Tested by
tests/accounting/empirical_test.py::test_no_bound_exceeds_the_truth_too_often.

The difference of means over the pooled standard deviation has a noncentral t distribution (Student's two-sample
statistic), so no limit theorem is needed. mu keeps its sign: where the difference is negative, the bound is 0. Taking
its absolute value instead reports a leak where chance made the held-out canaries score higher.
Scores of a mechanism that samples its units are mixtures and no Gaussians, so this bound is used at sampling
probability 1 alone.
"""

import numpy as np
from scipy import optimize, stats

_LARGEST_MU = 50.0


def mu(scores: np.ndarray, included: np.ndarray, significance: float) -> float:
    """A lower bound of mu >= 0.

    >>> draws = np.random.default_rng(0).normal(size=2000)
    >>> coins = np.arange(2000) % 2 == 0
    >>> 0.8 < mu(draws + 1.0 * coins, coins, significance=0.05) < 1.0
    True

    Args:
      scores: float [m].
      included: bool [m].
    """
    inside, outside = scores[included], scores[~included]
    freedom = len(scores) - 2
    if min(len(inside), len(outside)) < 2:
        return 0.0
    pooled = (((inside - inside.mean()) ** 2).sum() + ((outside - outside.mean()) ** 2).sum()) / freedom
    unit = np.sqrt(1 / len(inside) + 1 / len(outside))
    if not pooled > 0:
        return 0.0
    statistic = float((inside.mean() - outside.mean()) / np.sqrt(pooled) / unit)

    def excess(mu: float) -> float:
        return float(stats.nct.sf(statistic, freedom, mu / unit)) - significance

    if not np.isfinite(statistic) or excess(0.0) >= 0:
        return 0.0
    high = min(_LARGEST_MU, 2 * statistic * unit)  # above twice the estimate no such small statistic is unlikely
    if not excess(high) > 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-9))
