"""Epsilon over the steps of a run, for a progress bar: computed on a few points, never below the true bound in
between."""

import bisect
import math

from accounting.accountant import Accountant


class EpsilonCurve:
    """A staircase above epsilon(steps): the upper bound of the next computed point, which is at least that of any step
    before it.

    Formal guarantee: `at(steps)` is never below the accountant's upper bound after `steps` releases. Tested by
    tests/accounting/accountant_test.py::test_live_curve_never_shows_less_than_the_bound.

    A point is computed when its first step is asked for, so that a long run pays as it goes and a resumed one only for
    what is left.
    """

    def __init__(self, accountant: Accountant, delta: float, points: int = 16) -> None:
        self._accountant, self._delta = accountant, delta
        self._steps = sorted({math.ceil(accountant.steps * i / points) for i in range(1, points + 1)})
        self._epsilons: dict[int, float] = {}

    def at(self, steps: int) -> float:
        """An upper bound of epsilon after `steps` releases.

        Raises:
          ValueError: more steps than the mechanism has.
        """
        if steps == 0:
            return self._accountant.upper(self._delta, 0)
        if steps > self._steps[-1]:
            raise ValueError(f"{steps} steps exceed the {self._steps[-1]} that were accounted")
        point = self._steps[bisect.bisect_left(self._steps, steps)]
        if point not in self._epsilons:
            # A coarse grid is cheap, and no worse than the certified epsilon of the whole run.
            whole, interval = self._accountant.epsilon(self._delta).upper, self._accountant.interval_for(self._delta)
            self._epsilons[point] = (
                whole
                if point == self._accountant.steps
                else min(whole, self._accountant.upper(self._delta, point, interval))
            )
        return self._epsilons[point]
