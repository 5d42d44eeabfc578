"""Noise, steps, batch or units for a chosen risk, in the place of an epsilon.

A risk is what an attack can reach: an advantage, a detection rate, or a rate of right guesses of what a unit holds. All
follow from the trade-off curve f (accounting.conversions). Whoever guesses an attribute of one unit, or reconstructs
it, with a chance of `prior` where the unit took no part, is right with a chance of at most 1 - f(prior) where it did:
for each content z the guess is an event of the released results, so its chance is at most 1 - f of that without the
unit, and f is convex over z (Kulynych et al. 2025, arXiv 2507.06969, theorem 2).

Formal guarantee: the risk of a solved mechanism, together with what is released besides, has been computed and is at
most the one that was asked for; it is an upper bound of what any attack reaches. Tested by
tests/accounting/risk_test.py::test_a_solved_mechanism_has_no_more_than_the_risk and, against riskcal, by
::test_noise_agrees_with_riskcal.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from accounting import calibration, conversions
from accounting.accountant import Accountant
from accounting.conversions import PrivacyProfile
from accounting.errors import InputError
from accounting.mechanism import Mechanism

ADVANTAGE, DETECTION, INFERENCE = "advantage", "detection", "inference"
SYNTAX = "advantage:A, detection:RATE@FALSE_POSITIVE_RATE or inference:RATE@PRIOR"
_FORM = re.compile(r"(?:(advantage):([^@:]+)|(detection|inference):([^@:]+)@([^@:]+))")
_TOLERANCE = 1e-4
# A solved noise that stays so far below the risk met it because less noise cannot be accounted for.
_LEAST_SHARE = 0.98


@dataclasses.dataclass(frozen=True)
class Risk:
    """The most that an attack may reach.

    >>> Risk.of_text("detection:0.2@0.01")
    Risk(kind='detection', most=0.2, at=0.01)

    Attributes:
      kind: "advantage": true-positive less false-positive rate of telling whether one unit took part; "detection": its
        true-positive rate at a false-positive rate; "inference": rate of right guesses about what one unit holds.
      most: the rate.
      at: the false-positive rate, or the rate of right guesses without the results; None for an advantage.
    """

    kind: str
    most: float
    at: float | None = None

    @classmethod
    def of_text(cls, text: str) -> "Risk":
        """A risk in the form of SYNTAX.

        Raises:
          InputError: another form, or rates that say nothing.
        """
        found = _FORM.fullmatch(text)
        try:
            if found is None:
                raise ValueError(text)
            risk = cls(ADVANTAGE, float(found[2])) if found[1] else cls(found[3], float(found[4]), float(found[5]))
        except ValueError:
            raise InputError(f"`solve_for_risk`={text} is no risk: give {SYNTAX}") from None
        least = 0.0 if risk.at is None else risk.at
        if not 0 <= least < risk.most < 1 or risk.at == 0:
            raise InputError(
                f"`solve_for_risk`={text} needs rates between 0 and 1, and a larger one than is reached without any"
                f" results: give {SYNTAX}"
            )
        return risk

    def of(self, profile: PrivacyProfile) -> float:
        """The most that any attack reaches on a mechanism with this profile."""
        return profile.membership_advantage if self.at is None else profile.true_positive_rate(self.at)


def reached(risk: Risk, accountant: Accountant, delta: float) -> float:
    """The most that any attack reaches, an upper bound; 1 without a guarantee.

    Args:
      delta: down to which the profile is computed.
    """
    epsilon = accountant.epsilon(delta).upper
    if not math.isfinite(epsilon):
        return 1.0
    return risk.of(conversions.profile(accountant, delta, epsilon))


def solved(
    mechanism: Mechanism, quantity: str, risk: Risk, delta: float, *, also: Sequence[Mechanism] = ()
) -> Mechanism:
    """The mechanism with one quantity set so that it just meets a risk.

    Args:
      quantity: "noise_multiplier", "steps", "batch_size" or "num_units".

    Raises:
      InputError: no value of it meets the risk.
    """

    def meets(changed: Mechanism) -> bool:
        return reached(risk, Accountant(changed, also=also), delta) <= risk.most

    if (
        also
        and risk.of(conversions.profile(Accountant(also), delta, Accountant(also).epsilon(delta).upper)) > risk.most
    ):
        raise InputError("what is released beside the steps exceeds the risk by itself: raise `histogram_noise`")

    found = {
        "noise_multiplier": _noise_multiplier,
        "steps": _steps,
        "batch_size": _batch_size,
        "num_units": _num_units,
    }[quantity](mechanism, meets)
    if quantity == "noise_multiplier" and reached(risk, Accountant(found, also=also), delta) < _LEAST_SHARE * risk.most:
        raise InputError("so large a risk is not reached with any noise, and protects nobody: allow a smaller one")
    return found


def _noise_multiplier(mechanism: Mechanism, meets: Callable[[Mechanism], bool]) -> Mechanism:
    def at(sigma: float) -> Mechanism:
        return mechanism.replace(noise_multiplier=sigma)

    low, high = 0.5, 1.0
    while not meets(at(high)):
        low, high = high, 2 * high
        if high > calibration.LARGEST_NOISE:
            raise InputError(
                "no noise brings the risk so low with this batch size, number of steps and maximum batch: allow a"
                " larger risk, or take fewer steps"
            )
    while meets(at(low)):
        low, high = low / 2, low
        if low < calibration.SMALLEST_NOISE:
            raise InputError("almost no noise brings so large a risk, which protects nobody: allow a smaller one")
    _, high = calibration.shrink(lambda sigma: meets(at(sigma)), low, high, _TOLERANCE)
    return at(high)


def _steps(mechanism: Mechanism, meets: Callable[[Mechanism], bool]) -> Mechanism:
    def at(steps: int) -> Mechanism:
        return mechanism.replace(steps=steps)

    most = calibration.largest_integer(lambda t: meets(at(t)), 0, calibration.LARGEST_COUNT, start=64)
    if most == 0:
        raise InputError("even one step exceeds the risk: raise `noise_multiplier`, or allow a larger risk")
    return at(most)


def _batch_size(mechanism: Mechanism, meets: Callable[[Mechanism], bool]) -> Mechanism:
    def at(batch: int) -> Mechanism:
        return mechanism.replace(expected_batch_size=batch)

    start = max(1, int(mechanism.num_items / math.sqrt(mechanism.steps)))
    most = calibration.largest_integer(lambda b: meets(at(b)), 0, mechanism.num_items, start)
    if most == 0:
        raise InputError("even an expected batch of 1 exceeds the risk: raise `noise_multiplier`")
    return at(most)


def _num_units(mechanism: Mechanism, meets: Callable[[Mechanism], bool]) -> Mechanism:
    def at(units: int) -> Mechanism:
        return mechanism.replace(num_units=units)

    fewest = math.ceil(mechanism.expected_batch_size / mechanism.items_per_unit)
    high = fewest
    while not meets(at(high)):
        high *= 2
        if high > calibration.LARGEST_COUNT:
            raise InputError("no number of units brings the risk so low: raise `noise_multiplier`")
    low = max(fewest, high // 2)
    while high - low > max(1, int(_TOLERANCE * low)):
        middle = (low + high) // 2
        low, high = (low, middle) if meets(at(middle)) else (middle, high)
    return at(high)
