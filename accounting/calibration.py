"""Solving for the one omitted quantity of a privacy budget.

Every solver ends on the private side: the upper epsilon of the returned mechanism, together with what is released
besides (`also`), has been computed and is at most the target.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy import optimize

from accounting import rounding
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import Mechanism

SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e4
LARGEST_COUNT = 10**15
_COARSE = 4e-3


def _meets(
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    interval: float | None = None,
    *,
    also: Sequence[Mechanism],
) -> bool:
    return Accountant(mechanism, also=also).upper(delta, interval=interval) <= epsilon


def noise_multiplier(
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    *,
    also: Sequence[Mechanism] = (),
    tolerance: float = 1e-5,
) -> Mechanism:
    """The mechanism with the smallest noise, to a relative `tolerance`, that meets (epsilon, delta).

    Args:
      also: what is released besides; it shares the target.

    Raises:
      InputError: no noise multiplier up to LARGEST_NOISE does, or one below SMALLEST_NOISE does.
    """

    def at(sigma: float) -> Any:
        return mechanism.replace(noise_multiplier=sigma)

    if not epsilon > 0:
        raise InputError(f"epsilon must be positive, got {epsilon:g}")
    if math.isinf(epsilon):
        return at(0.0)
    _check(mechanism, epsilon, delta, also)

    def coarse(sigma: float) -> Any:
        return _meets(at(sigma), epsilon, delta, _COARSE, also=also)

    low, high = 0.25, 1.0
    while not coarse(high):
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise InputError(
                f"no noise reaches epsilon {epsilon:g} at delta {delta:g} with this batch size, number of steps and"
                " maximum batch: raise epsilon or delta, or take fewer steps"
            )
    while coarse(low):
        if low < SMALLEST_NOISE:
            raise InputError(
                f"almost no noise reaches epsilon {epsilon:g} at delta {delta:g}, which protect nobody: lower epsilon"
                " or delta, or give the noise multiplier"
            )
        low, high = low / 2, low
    low, high = shrink(coarse, low, high, 1e-2)
    # The interval that suffices at the coarse answer serves for all that follow.
    interval = Accountant(at(high), also=also).interval_for(delta)

    def excess(log_sigma: Any) -> Any:
        return Accountant(at(math.exp(log_sigma)), also=also).upper(delta, interval=interval) - epsilon

    while excess(math.log(low)) <= 0:
        low, high = low / 1.01, low
    sigma = math.exp(optimize.brentq(excess, math.log(low), math.log(high), xtol=tolerance / 2))
    while not _meets(at(sigma), epsilon, delta, also=also):
        sigma *= 1 + tolerance
    return at(sigma)


def steps(
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    *,
    also: Sequence[Mechanism] = (),
    largest: int = LARGEST_COUNT,
) -> Mechanism:
    """The mechanism with the most steps (at most `largest`) that meets (epsilon, delta); zero steps where one is too
    many.

    Raises:
      InputError: what is released besides does not meet it by itself.
    """
    _check(mechanism, epsilon, delta, also)
    accountant = Accountant(mechanism, also=also)
    most = largest_integer(lambda t: accountant.upper(delta, t) <= epsilon, 0, largest, start=max(1, mechanism.steps))
    return mechanism.replace(steps=most)


def expected_batch_size(
    mechanism: Mechanism, epsilon: float, delta: float, *, also: Sequence[Mechanism] = ()
) -> Mechanism:
    """The mechanism with the largest whole expected batch that meets (epsilon, delta).

    Raises:
      InputError: even a batch of one does not.
    """
    _check(mechanism, epsilon, delta, also)

    def at(b: Any) -> Any:
        return mechanism.replace(expected_batch_size=b)

    start = max(1, int(mechanism.num_items / math.sqrt(mechanism.steps)))
    best = largest_integer(lambda b: _meets(at(b), epsilon, delta, also=also), 0, mechanism.num_items, start)
    if best == 0:
        raise InputError(
            f"even an expected batch of 1 exceeds epsilon {epsilon:g} at delta {delta:g}: raise the noise multiplier"
        )
    return at(best)


def num_units(
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    *,
    also: Sequence[Mechanism] = (),
    tolerance: float = 1e-5,
) -> Mechanism:
    """The mechanism with the fewest units, to a relative `tolerance`, that meets (epsilon, delta).

    Raises:
      InputError: no number of units up to LARGEST_COUNT does.
    """
    _check(mechanism, epsilon, delta, also)

    def at(n: Any) -> Any:
        return mechanism.replace(num_units=n)

    fewest = math.ceil(mechanism.expected_batch_size / mechanism.items_per_unit)
    # At q = 1 / sqrt(steps) sampling begins to help; the search starts there and leaves out data sets far too small.
    high = math.ceil(fewest * math.sqrt(mechanism.steps))
    while not _meets(at(high), epsilon, delta, also=also):
        high *= 2
        if high > LARGEST_COUNT:
            raise InputError(
                f"no number of units reaches epsilon {epsilon:g} at delta {delta:g}: raise the noise multiplier"
            )
    low = max(fewest, high // 2)
    while _meets(at(low), epsilon, delta, also=also):
        if low == fewest:
            return at(fewest)
        low, high = max(fewest, low // 2), low

    def excess(log_n: Any) -> Any:
        return Accountant(at(round(math.exp(log_n))), also=also).upper(delta) - epsilon

    count = round(math.exp(optimize.brentq(excess, math.log(low), math.log(high), xtol=tolerance)))
    while not _meets(at(count), epsilon, delta, also=also):
        count = math.ceil(count * (1 + tolerance))
    return at(count)


def _check(mechanism: Mechanism, epsilon: float, delta: float, also: Sequence[Mechanism]) -> None:
    """Refuses a target that what is released besides passes by itself.

    Raises:
      InputError: it does.
    """
    alone = Accountant(mechanism, also=also).upper(delta, 0)
    if alone > epsilon:
        raise InputError(
            f"what is released beside the steps costs epsilon {rounding.upper(alone)} by itself, and the target is"
            f" {epsilon:g}: raise `histogram_noise`, or epsilon"
        )


def shrink(meets: Callable[[float], bool], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """Halves the logarithmic gap between a failing `low` and a meeting `high` down to `tolerance`."""
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return low, high


def largest_integer(meets: Callable[[int], bool], low: int, largest: int, start: int) -> int:
    """The largest integer in [low, largest] that meets a condition which small numbers meet; low is taken to
    meet it."""
    high = min(start, largest)
    while meets(high):
        if high == largest:
            return largest
        low, high = high, min(4 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
