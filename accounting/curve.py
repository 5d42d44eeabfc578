"""Epsilon over the steps of a run, for a progress bar: computed on a few points, never below the true bound in between."""

import bisect
import math

from accounting.accountant import Accountant


class EpsilonCurve:
    """A staircase above epsilon(steps): the upper bound of the next computed point, which is at least that of any step before it."""

    def __init__(self, accountant: Accountant, delta: float, points: int = 24):
        total = accountant.mechanism.steps
        self._steps = sorted({math.ceil(total * i / points) for i in range(1, points + 1)})
        # Every point is also bounded by the certified epsilon of the whole run, which may be a little tighter.
        whole, interval = accountant.epsilon(delta).upper, accountant.interval_for(delta)
        self._epsilons = [min(whole, accountant.upper(delta, t, interval)) for t in self._steps]

    def at(self, steps: int) -> float:
        """An upper bound of epsilon after `steps` releases.

        Raises:
          ValueError: more steps than the mechanism has.
        """
        if steps == 0:
            return 0.0
        if steps > self._steps[-1]:
            raise ValueError(f"{steps} steps exceed the {self._steps[-1]} that were accounted")
        return self._epsilons[bisect.bisect_left(self._steps, steps)]
