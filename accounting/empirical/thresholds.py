"""Lower bounds of epsilon from the rates at which a threshold on scores tells included canaries from others.

Formal guarantee: let the scores of the held-out canaries be independent draws of one distribution Q, and those of the
included ones independent draws of one distribution P. If P and Q are results of an (epsilon, delta)-differentially
private mechanism on neighbouring data sets, P[`with_epsilon_delta` exceeds epsilon] is at most the significance; if
their trade-off curve lies nowhere below a given one, so is P[`contradict` that curve]. This holds for any
numbers of canaries. Within one training run it holds where nothing couples the canaries: gradient canaries have a
coordinate each, on which noise is independent; texts that one model learned are coupled, and these bounds are not used
for them. Tested by tests/accounting/empirical_test.py::test_no_bound_exceeds_the_truth_too_often.

The thresholds are the k-th largest held-out scores, for K ranks k that are fixed beforehand. The rate at which Q lies
above its k-th largest of n draws has the law Beta(k, n - k + 1); given the threshold, the number of included scores
above it is binomial (Clopper and Pearson 1934). Each of the 2 K bounds has a share of 1 / (2 K) of the significance.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from accounting.empirical.families import Curve

# Shares of the held-out canaries that lie above a threshold, the largest one alone beside them.
_SHARES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is known of one threshold.

    Attributes:
      false_positive: upper bound of the share of Q above it.
      true_positive: lower bound of the share of P above it.
    """

    false_positive: float
    true_positive: float


def rates(scores: np.ndarray, included: np.ndarray, significance: float) -> list[Rates]:
    """Bounds of both rates at every threshold, all of them right together but for the significance.

    Args:
      scores: float [m], higher ones for canaries that seem to be included.
      included: bool [m].
    """
    inside, outside = scores[included], np.sort(scores[~included])[::-1]
    if not len(inside) or not len(outside):
        return []
    ranks = sorted({1, *(max(1, math.ceil(share * len(outside))) for share in _SHARES)})
    each = significance / (2 * len(ranks))
    found = []
    for k in ranks:
        above = int((inside > outside[k - 1]).sum())
        false_positive = float(stats.beta.ppf(1 - each, k, len(outside) - k + 1))
        true_positive = float(stats.beta.ppf(each, above, len(inside) - above + 1)) if above else 0.0
        found.append(Rates(false_positive, true_positive))
    return found


def with_epsilon_delta(known: list[Rates], delta: float) -> float:
    """The largest log((TPR - delta) / FPR) of all thresholds (Kairouz, Oh and Viswanath 2015), or 0.

    >>> round(with_epsilon_delta([Rates(0.01, 0.5)], delta=0.0), 2)
    3.91
    """
    return max(
        [0.0, *(math.log((r.true_positive - delta) / r.false_positive) for r in known if r.true_positive > delta)]
    )


def contradict(curve: Curve, known: list[Rates]) -> bool:
    """Whether a trade-off curve allows no such pair of rates."""
    return any(r.true_positive > 1 - curve(r.false_positive) for r in known)
