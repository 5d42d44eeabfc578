"""Families of mechanisms that an audit tests one after the other: what leaks least comes first.

A bound that knows the shape of a mechanism's trade-off curve is far sharper than one that knows a pair (epsilon, delta)
alone. The shape is a family with one number, the leak x: the curve falls, and epsilon grows, with x. An audit finds the
largest x whose curve the scores rule out; every mechanism of the family that leaks less is ruled out with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from scipy import optimize, special

from accounting import conversions
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import Mechanism

Curve = Callable[[float], float]

# Steps of the search in a family of scaled noise: a factor of 2^(1/8), about 9 %.
_PER_OCTAVE = 8
_OCTAVES = (-6, 2)
# Beyond this epsilon nothing is tested.
_LARGEST_EPSILON = 400.0
# Points of a curve.
_POINTS = 400
# Epsilon, epsilons and deltas of a curve that rules out nothing.
_NOTHING = (_LARGEST_EPSILON, np.zeros(1), np.ones(1))


class Family(Protocol):
    """Mechanisms ordered by their leak.

    Attributes:
      leaks: the leaks that are tested, ascending.
    """

    @property
    def leaks(self) -> Sequence[float]: ...

    def tradeoff(self, leak: float) -> Curve:
        """The least false-negative rate of any attack at a false-positive rate, or a lower bound of it: convex, falling
        and symmetric (its own inverse)."""
        ...

    def epsilon(self, leak: float) -> float:
        """Epsilon at the family's delta, or a lower bound of it."""
        ...


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """N(0, 1) against N(mu, 1) (Dong, Roth and Su 2022, arXiv 1905.02383, definition 2.6); the leak is mu.

    >>> round(Gaussians(delta=1e-5).epsilon(1.0), 2)
    4.38

    Attributes:
      delta: at which epsilon is stated.
      leaks: the tested mu.
    """

    delta: float
    leaks: Sequence[float] = tuple(np.geomspace(1e-3, 20, 400))

    def tradeoff(self, leak: float) -> Curve:
        def curve(false_positive_rate: float) -> float:
            return float(special.ndtr(-special.ndtri(false_positive_rate) - leak))

        return curve

    def epsilon(self, leak: float) -> float:
        return gaussian_epsilon(leak, self.delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of N(0, 1) against N(mu, 1) at delta: the root of Balle and Wang's formula (arXiv 1805.06530, theorem 8).

    >>> gaussian_epsilon(1e-6, delta=1e-5)
    0.0
    """

    def excess(epsilon: float) -> float:
        return float(conversions.gaussian_delta(epsilon, mu)) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    # With t = Phi^-1(1 - delta), delta(mu^2 / 2 + mu t) is at most delta.
    return float(optimize.brentq(excess, 0.0, mu**2 / 2 - mu * float(special.ndtri(delta)), xtol=1e-12))


class ScaledNoise:
    """A run's mechanisms with all their noise divided by x, and batches drawn without a cap.

    What truncation costs grows with e^epsilon, and would hide every curve beyond the run's own; so the run itself is
    in this family but for its cap, and `own` is the curve that its accountant proves, truncation included. A curve is
    a lower bound of the true one, so what it rules out leaks more indeed; epsilon is the lower end of the accountant's
    bracket.

    >>> from accounting.mechanism import dp_sgd
    >>> run = dp_sgd(1000, 100, None, noise_multiplier=1.0, clip_norm=1.0, steps=10)
    >>> family = ScaledNoise(run, delta=1e-5)
    >>> family.epsilon(1.0) < family.epsilon(2.0)
    True
    """

    def __init__(self, mechanisms: Mechanism | Sequence[Mechanism], delta: float, also: Sequence[Mechanism] = ()):
        """Takes what was executed.

        Args:
          mechanisms: of the steps, as Accountant takes them.
          delta: at which epsilon is stated.
          also: what was released besides; its noise is scaled too.
        """
        self.mechanisms = (mechanisms,) if isinstance(mechanisms, Mechanism) else tuple(mechanisms)
        self.also, self.delta = tuple(also), delta
        lowest, highest = (_PER_OCTAVE * octaves for octaves in _OCTAVES)
        self.leaks: Sequence[float] = tuple(2.0 ** (i / _PER_OCTAVE) for i in range(lowest, highest + 1))
        self._known = functools.lru_cache(maxsize=None)(self._at)

    def _at(self, leak: float) -> tuple[float, np.ndarray, np.ndarray]:
        def scaled(mechanism: Mechanism) -> Mechanism:
            return mechanism.replace(noise_multiplier=mechanism.noise_multiplier / leak, max_batch_size=None)

        try:
            return self._of(Accountant(tuple(map(scaled, self.mechanisms)), also=tuple(map(scaled, self.also))))
        except InputError:  # noise that is too small to be accounted for
            return _NOTHING

    def _of(self, accountant: Accountant) -> tuple[float, np.ndarray, np.ndarray]:
        """(epsilon from below, epsilons, deltas) of a profile."""
        bracket = accountant.epsilon(self.delta)
        if bracket.upper > _LARGEST_EPSILON:
            return _NOTHING
        profile = conversions.profile(accountant, self.delta, bracket.upper, _POINTS)
        return bracket.lower, profile.epsilons, profile.deltas

    @functools.cached_property
    def own(self) -> Curve:
        """What the accountant proves of the run itself."""
        return self._curve(*self._of(Accountant(self.mechanisms, also=self.also))[1:])

    def tradeoff(self, leak: float) -> Curve:
        return self._curve(*self._known(leak)[1:])

    def _curve(self, epsilons: np.ndarray, deltas: np.ndarray) -> Curve:
        kept, flat, steep = 1 - deltas, np.exp(-epsilons), np.exp(epsilons)

        def curve(false_positive_rate: float) -> float:
            lines = np.maximum(kept - steep * false_positive_rate, flat * (kept - false_positive_rate))
            return max(0.0, float(lines.max()))

        return curve

    def epsilon(self, leak: float) -> float:
        return self._known(leak)[0]


def largest_ruled_out(family: Family, is_ruled_out: Callable[[float], bool]) -> float | None:
    """The largest leak that is ruled out, by bisection; None where not even the least is.

    Whatever is returned was tested itself, so a bound that rests on it does not need the tests to be monotone.
    """
    leaks = family.leaks
    if not is_ruled_out(leaks[0]):
        return None
    low, high = 0, len(leaks)  # low is ruled out, high is not, or does not exist
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_ruled_out(leaks[middle]) else (low, middle)
    return leaks[low]
