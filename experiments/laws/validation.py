"""How far a law can be trusted: errors on what it was not fitted to, and intervals by resampling the runs.

Every kind of error belongs to one way of going beyond the data: a size or a noise level between two that were measured,
a larger model, a longer run, more noise. A prediction is given with the error of the ways that it goes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.laws.law import Law
from experiments.laws.points import Points
from experiments.sweep.results import LEARNING_RATE, PARAMETERS, RATIO, Table

BETWEEN, LARGER, LONGER, NOISIER = "between", "larger model", "longer run", "more noise"


@dataclasses.dataclass(frozen=True)
class Error:
    """Relative errors of predictions of points that were left out: the median, the 90 % quantile, and of how many."""

    median: float
    ninety: float
    count: int


def cross_validate(points: Points, fit: Callable[[Points], Law]) -> dict[str, Error]:
    """Errors by kind; a kind for which there are too few sizes, steps or noise levels is missing.

    Args:
      fit: from points to a law.
    """
    errors = {}
    for kind, folds in _folds(points).items():
        relative = []
        for test in folds:
            law = fit(points.where(~test))
            left_out = points.where(test)
            predicted = law.loss(left_out.parameters, left_out.steps, left_out.ratio)
            relative.append(np.abs(predicted / left_out.loss - 1))
        pooled = np.concatenate(relative) if relative else np.array([])
        pooled = pooled[np.isfinite(pooled)]
        if len(pooled):
            errors[kind] = Error(float(np.median(pooled)), float(np.quantile(pooled, 0.9)), len(pooled))
    return errors


def kinds(law: Law, parameters: float, steps: float, ratio: float) -> list[str]:
    """The ways in which one configuration goes beyond what a law was fitted to."""
    beyond = {
        LARGER: parameters > law.domain.parameters[1],
        LONGER: steps > law.domain.steps[1],
        NOISIER: ratio > law.domain.ratio[1],
    }
    return [kind for kind, is_beyond in beyond.items() if is_beyond] or [BETWEEN]


def expected_error(errors: dict[str, Error], law: Law, parameters: float, steps: float, ratio: float) -> float | None:
    """Returns the 90 % error of a prediction, with the errors of its kinds added in squares; None if one kind was never
    tested.
    """
    ways = kinds(law, parameters, steps, ratio)
    if any(way not in errors for way in ways):
        return None
    return float(np.sqrt(sum(errors[way].ninety ** 2 for way in ways)))


def _folds(points: Points) -> dict[str, list[np.ndarray]]:
    """For each kind the masks of what is left out, one law at a time."""
    sizes, ratios, steps = np.unique(points.parameters), np.unique(points.ratio), np.unique(points.steps)
    noisy = ratios[ratios > 0]
    between = [points.parameters == size for size in sizes[1:-1]] + [points.ratio == ratio for ratio in noisy[1:-1]]
    folds = {BETWEEN: between}
    if len(sizes) > 2:
        folds[LARGER] = [points.parameters == sizes[-1]]
    if len(steps) > 8:
        # Left out are the steps beyond 1 / 2.5 of the longest: the law must predict runs up to 2.5 times as long.
        folds[LONGER] = [points.steps > steps[-1] / 2.5]
    if len(noisy) > 3:
        folds[NOISIER] = [points.ratio == noisy[-1]]
    return folds


def resampled(table: Table, seed: int) -> Table:
    """The table with as many runs, drawn from its own with replacement (a bootstrap by runs, not by points of one run's
    curve).

    A cell of the grid keeps at least one run: what is drawn are the learning rates, within each model and noise level.
    """
    rng = np.random.default_rng(seed)
    keys = np.stack([table[PARAMETERS], table[RATIO], table[LEARNING_RATE]], axis=-1)
    runs, of_row = np.unique(keys, axis=0, return_inverse=True)
    of_row = of_row.reshape(-1)
    chosen = []
    for cell in np.unique(runs[:, :2], axis=0):
        members = np.flatnonzero((runs[:, :2] == cell).all(axis=1))
        chosen += sorted(set(rng.choice(members, len(members)).tolist()))
    return table.rows(np.isin(of_row, chosen))


def bootstrap(table: Table, fit: Callable[[Table], Law], samples: int, seed: int = 0) -> list[Law]:
    """Laws of so many resampled tables."""
    return [fit(resampled(table, seed + i)) for i in range(samples)]


def interval(laws: list[Law], parameters, steps, ratio, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the central interval of the laws' predictions."""
    predictions = np.stack([law.loss(parameters, steps, ratio) for law in laws])
    return tuple(np.nanquantile(predictions, [(1 - level) / 2, (1 + level) / 2], axis=0))
