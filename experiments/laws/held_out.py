"""A law against runs that it has not seen: what it said, between which ends, and what came out."""

import dataclasses

import numpy as np

from experiments.laws import points, sampling, validation
from experiments.laws.fitting import FittedLaw
from experiments.sweep.results import ITERATIONS, PARAMETERS, RATIO, Table


@dataclasses.dataclass(frozen=True)
class Trial:
    """One held-out configuration.

    Attributes:
      predicted, low, high: the law's loss, and the ends of its 90 % interval, in which the noise of the measured run is
        not counted.
      measured: loss at the end of the run, at its best learning rate.
      learning_rate, predicted_learning_rate: the vertex of the runs' own parabola, and the law's.
      beyond: in what it goes beyond what the law was fitted to.
    """

    model: str
    parameters: float
    steps: float
    ratio: float
    predicted: float
    low: float
    high: float
    measured: float
    learning_rate: float
    predicted_learning_rate: float
    beyond: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative error of the predicted loss against the measured one."""
        return self.predicted / self.measured - 1


def trials(fitted: FittedLaw, table: Table) -> list[Trial]:
    """Every held-out configuration of a table, at the end of its longest run."""
    table = sampling.apply(table, fitted.law.sampling)
    kept = points.held_out(points.settled(table.rows(table.held_out)))
    if not len(kept):
        return []
    names = {size: name for name, size in table.sizes.items()}
    found = []
    for size, ratio in np.unique(np.stack([kept[PARAMETERS], kept[RATIO]], axis=-1), axis=0):
        runs = points.smoothed(kept.rows((kept[PARAMETERS] == size) & (kept[RATIO] == ratio)))
        end = points.best(runs.rows(runs[ITERATIONS] == runs[ITERATIONS].max()), points.VERTEX)
        place = size, float(end.steps[0]), ratio
        predicted = float(fitted.law.loss(*place))
        error = validation.stated_error(fitted.law, *place)
        found.append(
            Trial(
                model=names[size],
                parameters=size,
                steps=place[1],
                ratio=ratio,
                predicted=predicted,
                low=predicted / (1 + error),
                high=predicted * (1 + error),
                measured=float(end.loss[0]),
                learning_rate=float(end.learning_rate[0]),
                predicted_learning_rate=float(fitted.law.learning_rate(*place)),
                beyond=tuple(validation.kinds(fitted.law, *place)),
            )
        )
    return found


def text(found: list[Trial]) -> str:
    """The trials as a table for a terminal."""
    lines = [
        f"{'held out':<14} {'steps':>6} {'noise':>9} {'predicted':>10} {'interval':>17} {'measured':>9} {'error':>7}"
        "  beyond"
    ]
    lines += [
        f"{t.model:<14} {t.steps:>6.0f} {t.ratio:>9.3g} {t.predicted:>10.4f} {f'{t.low:.4f} {t.high:.4f}':>17}"
        f" {t.measured:>9.4f} {100 * t.error:>6.2f}%  {', '.join(t.beyond)}"
        for t in found
    ]
    return "\n".join(lines)
