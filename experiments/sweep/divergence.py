"""A run that has diverged is stopped: what is left of it would cost time and be left out of every law.

The rule is public, and so are the data: a run of a sweep on public data is stopped after STREAK points of its curve in
a row whose mean losses are no numbers, or above that of its first point.

Formal guarantee: a run on private data takes all its steps, whatever its losses, so that where it ends tells nothing of
the data. Tested by tests/experiments/divergence_test.py::test_a_diverging_run_on_private_data_takes_all_its_steps.
"""

import math
import pathlib

from dpgemma.training.observers import Private, Released, Silent
from experiments.sweep import harvest

STREAK = 3


class Divergence(Silent):
    """Watches the losses of a run.

    Attributes:
      stopped_at: the steps after which the rule was met; None as long as it is not.
    """

    def __init__(self, steps: int) -> None:
        self.stopped_at: int | None = None
        self._ends = set(harvest.ends(steps))
        self._steps, self._losses = steps, {}

    def take_up(self, metrics: pathlib.Path) -> None:
        """Reads the losses of the steps that were taken before."""
        if metrics.is_file():
            self._losses = harvest.losses(metrics)

    def step(self, released: Released, private: Private) -> None:
        taken = released.steps
        if self.stopped_at is not None:
            return
        self._losses.pop(taken - 1, None)
        if private.units:
            self._losses[taken - 1] = private.loss
        if taken in self._ends and has_diverged(
            [loss for end, loss in harvest.points(self._losses, self._steps) if end <= taken]
        ):
            self.stopped_at = taken


def has_diverged(curve: list[float | None]) -> bool:
    """Whether the rule is met at the end of a curve of mean losses, None where none was finite.

    >>> has_diverged([4.0, 3.0, 5.0, 6.0, 7.0]), has_diverged([4.0, 5.0, 6.0, 3.9]), has_diverged([4.0, 3.0, None])
    (True, False, False)
    """
    if len(curve) <= STREAK:
        return False
    start = math.inf if curve[0] is None else curve[0]
    return all(loss is None or loss > start for loss in curve[-STREAK:])
