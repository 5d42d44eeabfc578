"""Solving for the one omitted quantity of a privacy budget.

Every solver ends on the private side: the returned mechanism's own upper epsilon has been computed and is at most the target.
"""

import dataclasses
import math
from collections.abc import Callable

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import DpSgdMechanism

LARGEST_NOISE = 1e4
LARGEST_COUNT = 10**15
_COARSE = 1e-3


def _meets(mechanism: DpSgdMechanism, epsilon: float, delta: float, **accountant_options) -> bool:
    return Accountant(mechanism, **accountant_options).upper(delta) <= epsilon


def noise_multiplier(mechanism: DpSgdMechanism, epsilon: float, delta: float, *, tolerance: float = 1e-4) -> DpSgdMechanism:
    """The mechanism with the smallest noise, to a relative `tolerance`, that meets (epsilon, delta).

    Raises:
      InputError: no noise multiplier up to LARGEST_NOISE does.
    """
    at = lambda sigma: dataclasses.replace(mechanism, noise_multiplier=sigma)
    if not epsilon > 0:
        raise InputError(f"epsilon must be positive, got {epsilon:g}")
    if math.isinf(epsilon):
        return at(0.0)
    low, high = 1e-2, 1.0
    coarse = lambda sigma: _meets(at(sigma), epsilon, delta, discretisation=_COARSE)
    while not coarse(high):
        low, high = high, 4 * high
        if high > LARGEST_NOISE:
            raise InputError(
                f"no noise reaches epsilon {epsilon:g} at delta {delta:g} with this batch size, number of steps and maximum batch:"
                " raise epsilon or delta, or take fewer steps"
            )
    low, high = _shrink(coarse, low, high, tolerance)
    # The coarse grid lands within about a per cent; the fine one decides, from a bracket around it that widens until it holds.
    fine = lambda sigma: _meets(at(sigma), epsilon, delta)
    margin = 1 + 2 * tolerance
    low, high = low / margin, high
    while not fine(high):
        low, high, margin = high, high * margin, margin**2
    while fine(low):
        low, high, margin = low / margin, low, margin**2
    return at(_shrink(fine, low, high, tolerance)[1])


def steps(mechanism: DpSgdMechanism, epsilon: float, delta: float, *, largest: int = LARGEST_COUNT) -> DpSgdMechanism:
    """The mechanism with the most steps (at most `largest`) that meets (epsilon, delta); zero steps where one is too many."""
    accountant = Accountant(mechanism)
    return dataclasses.replace(
        mechanism, steps=_largest_integer(lambda t: accountant.upper(delta, t) <= epsilon, 0, largest, start=max(1, mechanism.steps))
    )


def expected_batch_size(mechanism: DpSgdMechanism, epsilon: float, delta: float) -> DpSgdMechanism:
    """The mechanism with the largest whole expected batch that meets (epsilon, delta).

    Raises:
      InputError: even a batch of one does not.
    """
    at = lambda b: dataclasses.replace(mechanism, expected_batch_size=b)
    best = _largest_integer(lambda b: _meets(at(b), epsilon, delta), 0, mechanism.num_units, start=max(1, mechanism.num_units // 64))
    if best == 0:
        raise InputError(f"even an expected batch of 1 exceeds epsilon {epsilon:g} at delta {delta:g}: raise the noise multiplier")
    return at(best)


def num_units(mechanism: DpSgdMechanism, epsilon: float, delta: float, *, tolerance: float = 1e-5) -> DpSgdMechanism:
    """The mechanism with the fewest units, to a relative `tolerance`, that meets (epsilon, delta).

    Raises:
      InputError: no number of units up to LARGEST_COUNT does.
    """
    at = lambda n: dataclasses.replace(mechanism, num_units=n)
    low = high = math.ceil(mechanism.expected_batch_size)
    if _meets(at(low), epsilon, delta):
        return at(low)
    while not _meets(at(high), epsilon, delta):
        low, high = high, 4 * high
        if high > LARGEST_COUNT:
            raise InputError(f"no number of units reaches epsilon {epsilon:g} at delta {delta:g}: raise the noise multiplier")
    while high - low > max(1, tolerance * high):
        middle = (low + high) // 2
        low, high = (low, middle) if _meets(at(middle), epsilon, delta) else (middle, high)
    return at(high)


def _shrink(meets: Callable[[float], bool], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """Halves the logarithmic gap between a failing `low` and a meeting `high` down to `tolerance`."""
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return low, high


def _largest_integer(meets: Callable[[int], bool], low: int, largest: int, start: int) -> int:
    """The largest integer in [low, largest] that meets a condition which small numbers meet; low is taken to meet it."""
    high = min(start, largest)
    while meets(high):
        if high == largest:
            return largest
        low, high = high, min(4 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
