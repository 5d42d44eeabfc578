"""The least of one budget that reaches a loss while the others stay: what epsilon, how many units, how much compute."""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting.errors import InputError
from experiments.laws.law import Domain
from experiments.planning.optimum import Budget

# By what the answer may be too large, as a factor.
_PRECISION = {"epsilon": 1.07, "num_units": 1.1, "compute": 1.1}
_PLACES = 24  # between the ends, at which the law is asked whether it has an answer
NAMES = {"epsilon": "epsilon", "num_units": "number of units", "compute": "compute"}


def ends(what: str, domain: Domain, num_units: float, sequence_length: int) -> tuple[float, float]:
    """Between what the least of one budget is looked for: all compute that a law's sizes and steps allow, and epsilons
    and numbers of units that anyone might have.
    """
    (smallest, largest), (few, many) = domain.parameters, domain.steps
    return {
        "epsilon": (2.0**-4, 2.0**9),
        "num_units": (100.0, 1e12),
        "compute": (
            6 * sequence_length * smallest * few,
            6 * sequence_length * largest * many * max(1.0, num_units / 2),
        ),
    }[what]


def least(
    what: str, loss: float, budget: Budget, lowest_loss: Callable[[Budget], float], low: float, high: float
) -> Budget:
    """The budget with the least of one quantity that reaches a loss.

    Of too little or too much compute there may be no answer of the law; then it counts as out of reach.

    Args:
      what: "epsilon", "num_units" or "compute"; that field of `budget` is not looked at.
      lowest_loss: of a budget; raises InputError where the law has no answer.
      low, high: between which it is looked for.

    Raises:
      InputError: no value in between reaches it.
    """

    def of(log_value: float) -> Budget:
        return dataclasses.replace(budget, **{what: math.exp(log_value)})

    @functools.cache
    def excess(log_value: float) -> float:
        try:
            return math.log(lowest_loss(of(log_value)) / loss)
        except InputError:
            return math.inf

    first, last = math.log(low), _most(excess, math.log(low), math.log(high))
    if excess(last) > 0:
        raise InputError(
            f"no {NAMES[what]} reaches a loss of {loss:g}: with {math.exp(last):.3g} it is"
            f" {loss * math.exp(excess(last)):.4g}; ask for a higher loss, or raise another budget"
        )
    tolerance = math.log(_PRECISION[what])
    if excess(first) <= 0:
        return of(first)
    while last - first > tolerance:
        # By the secant where both ends have a loss, kept away from them, so that each step shortens the interval.
        share = 0.5 if math.isinf(excess(first)) else excess(first) / (excess(first) - excess(last))
        middle = first + min(max(share, 0.15), 0.85) * (last - first)
        first, last = (middle, last) if excess(middle) > 0 else (first, middle)
    return of(last)


def _most(excess: Callable[[float], float], low: float, high: float) -> float:
    """The most for which the law has an answer, to a factor of 1.5.

    Raises:
      InputError: it has none for any.
    """
    if math.isfinite(excess(high)):
        return high
    step = (high - low) / _PLACES
    last = next((high - i * step for i in range(1, _PLACES) if math.isfinite(excess(high - i * step))), None)
    if last is None:
        raise InputError("the law has no answer for any such budget: change the others")
    while step > math.log(1.5):
        step /= 2
        last = last + step if math.isfinite(excess(last + step)) else last
    return last
