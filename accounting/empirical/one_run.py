"""Lower bounds of epsilon from one training run, by the number of canaries whose coins are guessed from it.

m canaries are each included by a fair coin; whoever sees the released results, and no coin, guesses some of the coins
and abstains from the others. A mechanism that tells little makes few guesses right, whatever the attack and however the
canaries interfere with each other: nothing here assumes that their scores are independent.

Formal guarantee: for every (epsilon, delta)-differentially private mechanism, and every way to guess that sees its
results alone, P[`with_epsilon_delta` exceeds epsilon] is at most the significance; for every mechanism whose trade-off
curve lies nowhere below a given one, P[`contradicts` that curve] is at most the significance. Both hold for any number
of canaries. Tested by tests/accounting/empirical_test.py::test_no_bound_exceeds_the_truth_too_often and,
for the recursion, against a linear program by ::test_the_recursion_is_the_optimum_of_a_linear_program.
"""

import functools
import math

import numpy as np
from scipy import stats

from accounting.empirical.families import Curve

# Epsilons are found to this precision, from below.
_PRECISION = 1e-3
_LARGEST = 200.0


def correct_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many guesses are right, where the highest scores are guessed to be included and the lowest to be held out.

    >>> correct_guesses(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, True]), guesses=4)
    3

    Args:
      scores: float [m], from the results alone; equal ones are ranked by their number.
      included: bool [m], the coins.
      guesses: r <= m, an even number: half of them in either direction.
    """
    order = np.argsort(-scores, kind="stable")
    half = guesses // 2
    return int(included[order[:half]].sum() + (~included[order[len(order) - half :]]).sum())


@functools.lru_cache(maxsize=4096)
def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound of the probability of so many right guesses under (epsilon, delta) (Steinke, Nasr and Jagielski 2023,
    arXiv 2305.08846, theorem 5.2).

    >>> p_value(canaries=10, guesses=10, correct=10, epsilon=0.0, delta=0.0) == 2.0**-10
    True

    Args:
      canaries: m, of which each was included by a fair coin.
      guesses: r, of which nobody abstained.
      correct: v of them.
    """
    law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(law.sf(correct - 1))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(law.pmf(correct - np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max()))


@functools.lru_cache(maxsize=4096)
def with_epsilon_delta(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest epsilon (up to 0.001) under which so many right guesses are less likely than the significance.

    >>> with_epsilon_delta(canaries=1000, guesses=100, correct=100, delta=1e-5, significance=0.05)
    3.465...
    >>> with_epsilon_delta(canaries=1000, guesses=100, correct=50, delta=1e-5, significance=0.05)
    0.0

    Returns:
      A lower bound of epsilon at delta; 0 where nothing is ruled out.
    """
    low, high = 0.0, _LARGEST
    if p_value(canaries, guesses, correct, 0.0, delta) > significance:
        return 0.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        is_unlikely = p_value(canaries, guesses, correct, middle, delta) <= significance
        low, high = (middle, high) if is_unlikely else (low, middle)
    return low


def contradicts(curve: Curve, canaries: int, guesses: int, correct: int, significance: float) -> bool:
    """Whether so many right guesses, or more, are less likely than the significance under a trade-off curve.

    Let p_i be the probability of i right guesses, r_i = sum over j >= i of (j / m) p_j, and h_i the same sum of
    ((g - j) / m) p_j. Turning over the coin of a canary drawn at random gives r_i <= 1 - f(h_(i-1)) for every i, so
    h_(i-1) is at least f(1 - r_i) for a symmetric f. If p_c + p_(c+1) + ... were as large as the significance, these
    inequalities would ask for more than r_0 + h_0 = g / m (Mahloujifar, Melis and Chaudhuri 2024, arXiv 2410.22235).

    Args:
      curve: f, symmetric.
      canaries: m.
      guesses: g, a number that does not depend on the coins.
      correct: c.
    """
    right = significance * correct / canaries
    wrong = significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        if right + wrong > guesses / canaries:
            return True
        more = max(wrong, curve(1 - right))
        right, wrong = right + i / (guesses - i) * (more - wrong), more
    return right + wrong > guesses / canaries
