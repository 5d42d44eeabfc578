"""How far a law can be trusted: what it says of its own errors, and whether that holds on what it was not fitted to.

The law's deviation (mixture) grows with the distance from the data. It is held against nested cross-validation: a part
of the table is taken out, everything is done again with the rest, from the smoothing on, and the loss of what was taken
out is predicted. Every part belongs to one way of going beyond the data: a size or a noise level between two that were
measured, a larger model, a longer run, more noise. Where fewer than nine of ten of all that was left out lie within
the stated error, what is stated is widened until they do.
"""

import dataclasses

import numpy as np

from experiments.laws import mixture, points
from experiments.laws.law import Law
from experiments.laws.mixture import Mixture
from experiments.laws.points import Points
from experiments.sweep.results import ITERATIONS, PARAMETERS, RATIO, Table

BETWEEN, LARGER, LONGER, NOISIER = "between", "larger model", "longer run", "more noise"
# Deviations within which nine of ten values of a normal distribution lie.
_NINETY = 1.645
# What is left must have so many sizes, steps and noise levels for a law.
_FEWEST = 2, 4, 3
_LONGER = (1.6, 2.5)  # parts of the longest run's steps that are predicted from the others
_LEFT_OUT = "left out"
_MOST_FOLDS = 3  # of sizes and of noise levels between others


@dataclasses.dataclass(frozen=True)
class Error:
    """Relative errors of predictions of what was left out, and how they compare with what the law said of them.

    Attributes:
      median, ninety: the median and the 90 % quantile of the errors; the measured losses' own noise is in them.
      coverage: the share that lies within the stated 90 % interval, with that noise.
      count: of points.
    """

    median: float
    ninety: float
    coverage: float
    count: int


@dataclasses.dataclass(frozen=True)
class _Fold:
    """Masks of a table's rows: what a law is fitted to, and what it must predict."""

    kept: np.ndarray
    left_out: np.ndarray


def cross_validate(table: Table, whole: Mixture) -> tuple[dict[str, Error], float]:
    """(errors by kind, by which the stated deviations must be widened, at least 1); a kind for which there are too few
    sizes, steps or noise levels is missing.

    Args:
      table: runs that are sound (points.kept_runs), their noise-batch ratios effective ones.
      whole: the mixture that is fitted to all of it, from whose constants those of the folds begin.
    """
    errors, all_within = {}, [np.zeros(1)]
    for kind, folds in _folds(table).items():
        tried = [found for fold in folds if (found := _tried(table, fold, whole)) is not None]
        if tried:
            off, deviations = (np.concatenate(parts) for parts in zip(*tried, strict=True))
            relative, stated = np.abs(np.expm1(off)), _NINETY * deviations
            within = np.abs(off) / stated
            errors[kind] = Error(
                median=float(np.median(relative)),
                ninety=float(np.quantile(relative, 0.9)),
                coverage=float(np.mean(within <= 1)),
                count=len(off),
            )
            all_within.append(within)
    return errors, max(1.0, float(np.quantile(np.concatenate(all_within), 0.9)))


def _tried(table: Table, fold: _Fold, whole: Mixture) -> tuple[np.ndarray, np.ndarray] | None:
    """(predicted minus measured ln loss, its stated deviation) of what a fold leaves out; None where what it keeps is
    too little for a law.
    """
    kept, shape = points.of_kept_runs(table.rows(fold.kept))
    counts = [len(np.unique(values)) for values in (kept.parameters, kept.steps, kept.ratio)]
    if any(count < least for count, least in zip(counts, _FEWEST, strict=True)):
        return None
    law = mixture.fit(points.thinned(kept), whole)
    left_out = _measured(table, fold.left_out, shape)
    predicted, deviation = law.at(law.places(left_out.parameters, left_out.steps, left_out.ratio))
    return predicted - np.log(left_out.loss), np.hypot(deviation, law.noise)


def _measured(table: Table, rows: np.ndarray, shape: points.SharedParabola | None) -> Points:
    """The losses of rows at the best learning rate, by the parabola of what was kept, smoothed among themselves."""
    settled = points.settled(Table({**table.columns, _LEFT_OUT: rows.astype(float)}))
    left_out = points.averaged(points.ends_of_falling_rates(settled.rows(settled[_LEFT_OUT] > 0)))
    return points.thinned(points.best(points.smoothed(left_out), points.ACROSS, shape))


def kinds(law: Law, parameters: float, steps: float, ratio: float) -> list[str]:
    """The ways in which one configuration goes beyond what a law was fitted to."""
    beyond = {
        LARGER: parameters > law.domain.parameters[1],
        LONGER: steps > law.domain.steps[1],
        NOISIER: ratio > law.domain.ratio[1],
    }
    return [kind for kind, is_beyond in beyond.items() if is_beyond] or [BETWEEN]


def expected_error(errors: dict[str, Error], law: Law, parameters: float, steps: float, ratio: float) -> float | None:
    """Within which share of the loss the prediction lies nine times of ten, the noise of a single run not counted; None
    if one kind was never tested.
    """
    if any(way not in errors for way in kinds(law, parameters, steps, ratio)):
        return None
    return stated_error(law, parameters, steps, ratio)


def stated_error(law: Law, parameters: float, steps: float, ratio: float) -> float:
    """The same, tested or not."""
    return float(np.expm1(_NINETY * law.deviation(parameters, steps, ratio)))


def _folds(table: Table) -> dict[str, list[_Fold]]:
    """The folds of each kind."""
    parameters, ratio, iterations = table[PARAMETERS], table[RATIO], table[ITERATIONS]
    sizes, steps = np.unique(parameters), np.unique(iterations)
    # Runs of several batches have noise levels of their own: what lies within a factor of two is one level.
    level = np.where(ratio > 0, np.round(np.log2(np.maximum(ratio, 1e-300))), -np.inf)
    levels = np.unique(level[ratio > 0])
    masks = [parameters == size for size in _some(sizes[1:-1])] + [level == x for x in _some(levels[1:-1])]
    folds = {BETWEEN: [_Fold(~mask, mask) for mask in masks]}
    # Two sizes say little of a third; they are asked where there are no more.
    edges = sizes[-2:1:-1][:2] if len(sizes) > 3 else sizes[-2:0:-1]
    folds[LARGER] = [_Fold(~mask, mask) for mask in (parameters > edge for edge in edges)]
    cuts = [steps[steps <= steps[-1] / share][-1] for share in _LONGER if (steps <= steps[-1] / share).any()]
    folds[LONGER] = [_Fold(iterations <= cut, iterations > cut) for cut in cuts]
    folds[NOISIER] = [_Fold(~mask, mask) for mask in (level > edge for edge in levels[-2:0:-1][:2])]
    return folds


def _some(values: np.ndarray) -> np.ndarray:
    """At most _MOST_FOLDS of them, evenly spaced."""
    if len(values) <= _MOST_FOLDS:
        return values
    return values[np.round(np.linspace(0, len(values) - 1, _MOST_FOLDS + 2)[1:-1]).astype(int)]
