"""From a results table to the losses that a law is fitted to: one for each model, number of steps and noise-batch
ratio.

The steps are those of arXiv 2501.18914 (section 3, appendix E) with what VaultGemma changed (arXiv 2510.15001): warm-up
is cut off, measurement noise is smoothed by what must be monotone, and the best learning rate is the vertex of a
parabola across runs, not the best of three. Every function takes a table and returns another; none changes what it is
given.
"""

import dataclasses

import numpy as np
from scipy import optimize

from accounting.errors import InputError
from experiments.laws.learning_rate import LearningRate, fit_learning_rate
from experiments.laws.soundness import runs_of, sound
from experiments.sweep.results import (
    BATCH,
    CONFIG,
    DATA,
    HELD_OUT,
    ITERATIONS,
    LEARNING_RATE,
    LENGTH,
    LOSS,
    PARAMETERS,
    RATIO,
    SCHEDULE,
    TOKENIZER,
    WINDOW,
    Table,
)

GRID, VERTEX, ACROSS = "grid", "vertex", "across"
CONSTANT = "constant"  # the schedule after whose warm-up the learning rate stays
# How far outside the tried learning rates a parabola's vertex is believed, in distances between two of them.
_REACH = 1.0
# Cells whose own parabola must be found before they can share one.
_FEWEST_PARABOLAS = 20
_MOST_POINTS, _MOST_OF_A_CURVE, _LEAST_OF_A_CURVE = 400, 12, 4
_MANY_ROWS, _MOST_STEPS = 50_000, 24
_NEAR = 0.45  # in ln T: points of a run through which its slope is taken


@dataclasses.dataclass(frozen=True)
class Points:
    """Losses at the best learning rate, all arrays [n]: float64 parameters M, steps T, noise-batch ratio, loss,
    learning rate.
    """

    parameters: np.ndarray
    steps: np.ndarray
    ratio: np.ndarray
    loss: np.ndarray
    learning_rate: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: np.ndarray) -> "Points":
        return Points(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def usable(table: Table) -> Table:
    """Without rows that are there to test a law, without runs that diverged or lie on another scale (soundness), and
    of runs whose learning rate falls, with the end alone; seeds averaged.

    Raises:
      InputError: nothing is left, or runs of several kinds are mixed.
    """
    return averaged(ends_of_falling_rates(kept_runs(table)))


def kept_runs(table: Table) -> Table:
    """The rows of the runs that a law may be fitted to, each as it is.

    Raises:
      InputError: nothing is left, or runs of several kinds are mixed.
    """
    table = table.rows(~table.held_out)
    if not len(table):
        raise InputError("no row of the table can be fitted: all are held out")
    check_alike(table)
    kept, left_out = sound(table)
    if not len(kept):
        raise InputError(f"no run of the table can be fitted ({left_out[0]})")
    return kept


def check_alike(table: Table) -> None:
    """Refuses runs that one law does not hold for.

    Raises:
      InputError: names the column in which they differ, and the values.
    """
    for name in (BATCH, SCHEDULE, LENGTH, TOKENIZER, DATA):
        if name in table.columns:
            found = np.unique(table[name])
            found = found[found != ""] if found.dtype.kind == "U" else found[~np.isnan(found)]  # an empty cell: unknown
            if len(found) > 1:
                some = ", ".join(str(value) if found.dtype.kind == "U" else f"{value:g}" for value in found[:4])
                raise InputError(
                    f"the table mixes runs that differ in {name!r} ({some}), and one law does not hold for all: fit"
                    " each kind by itself"
                )


def ends_of_falling_rates(table: Table) -> Table:
    """A point on the way of a run is the end of a shorter one only where the learning rate stays: of runs with another
    schedule the last point alone is kept.
    """
    if SCHEDULE not in table.columns:
        return table
    keep = np.isin(table[SCHEDULE], (CONSTANT, ""))  # which is not said is taken for constant, as in older tables
    if keep.all():
        return table
    for rows in runs_of(table):
        keep[rows[-1]] = True
    return table.rows(keep)


def settled(table: Table) -> Table:
    """Every run from an eighth of its own length on, at most the 1000 iterations of arXiv 2501.18914, with the losses
    at its points in place of the means over the steps before them, where the table says how many those are.

    A mean over a window of w steps is the loss of about w / 2 steps before; it is moved to the window's end along a
    straight line, in logarithms, through its neighbours.
    """
    loss, keep = table[LOSS].copy(), np.ones(len(table), bool)
    for rows in runs_of(table):
        steps = table[ITERATIONS][rows]
        keep[rows] = steps >= min(1000.0, steps.max() / 8)
        if WINDOW in table.columns and np.isfinite(table[WINDOW][rows]).all():
            loss[rows] = _at_ends(steps, table[WINDOW][rows], loss[rows])
    columns = {name: column for name, column in table.columns.items() if name != WINDOW}
    return Table({**columns, LOSS: loss}).rows(keep)


def _at_ends(steps: np.ndarray, window: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The losses at the ends of windows, from their means; as they are where a run has hardly any points, or a loss
    that is none.
    """
    if len(steps) < 3 or not (np.isfinite(loss) & (loss > 0)).all():
        return loss
    middle, log_loss = np.log(steps - window / 2), np.log(loss)
    moved = log_loss.copy()
    for i in range(len(steps)):
        near = np.abs(middle - middle[i]) < _NEAR
        if near.sum() >= 3:
            slope = np.polyfit(middle[near], log_loss[near], 1)[0]
            moved[i] += min(slope, 0.0) * (np.log(steps[i]) - middle[i])
    return np.exp(moved)


def held_out(table: Table) -> Table:
    """The rows that test a law."""
    return averaged(table.rows(table.held_out & np.isfinite(table[LOSS])))


def averaged(table: Table) -> Table:
    """One row for each model, learning rate, number of steps and ratio: the mean over seeds."""
    keys, first, inverse = _groups(table, (PARAMETERS, LEARNING_RATE, ITERATIONS, RATIO))
    if len(keys) == len(table):
        return table
    means = np.bincount(inverse, table[LOSS]) / np.bincount(inverse)
    kept = table.rows(first)
    return Table(
        {
            name: means if name == LOSS else column
            for name, column in kept.columns.items()
            if name not in (CONFIG, HELD_OUT)
        }
    )


def after_warm_up(table: Table, iterations: float) -> Table:
    """Rows of at least so many iterations: the learning rate has not reached its peak before, or only just."""
    kept = table.rows(table[ITERATIONS] >= iterations)
    if not len(kept):
        raise InputError(f"no row has {iterations:g} iterations: lower the warm-up cut")
    return kept


def default_warm_up(table: Table) -> float:
    """An eighth of the longest common run, at most the 1000 iterations of arXiv 2501.18914."""
    return min(1000.0, float(np.max(table[ITERATIONS])) / 8)


def smoothed(table: Table) -> Table:
    """Losses made monotone, per model and learning rate: non-increasing in steps, then non-decreasing in noise
    (isotonic regressions).

    A missing cell is left out of its row's and its column's regression and stays missing.
    """
    loss = table[LOSS].copy()
    for along, across, increasing in ((ITERATIONS, RATIO, False), (RATIO, ITERATIONS, True)):
        for line in _rows_of_groups(table, (PARAMETERS, LEARNING_RATE, across)):
            line = line[np.argsort(table[along][line], kind="stable")]
            loss[line] = optimize.isotonic_regression(loss[line], increasing=increasing).x
    return Table({**table.columns, LOSS: loss})


def with_fewer_steps(table: Table) -> Table:
    """Of a large table _MOST_STEPS numbers of steps, evenly spaced in logarithms, with losses that all its points have
    a part in, by the isotonic regression along the steps.
    """
    steps = np.unique(table[ITERATIONS])
    if len(table) <= _MANY_ROWS or len(steps) <= _MOST_STEPS:
        return table
    loss = table[LOSS].copy()
    for line in _rows_of_groups(table, (PARAMETERS, LEARNING_RATE, RATIO)):
        line = line[np.argsort(table[ITERATIONS][line], kind="stable")]
        loss[line] = optimize.isotonic_regression(loss[line], increasing=False).x
    wanted = np.geomspace(steps[0], steps[-1], _MOST_STEPS)
    kept = steps[np.unique(np.abs(np.log(steps)[:, None] - np.log(wanted)).argmin(axis=0))]
    return Table({**table.columns, LOSS: loss}).rows(np.isin(table[ITERATIONS], kept))


def best(table: Table, how: str = "across", shape: "SharedParabola | None" = None) -> Points:
    """The loss at the best learning rate of each cell.

    Args:
      how: "grid" takes the lowest of those that were tried; "vertex" the vertex of the parabola through them in log2 of
        the learning rate, where three were tried, it opens upwards and its vertex is not far outside of them, else the
        lowest; "across" lets all cells share one parabola, whose vertex and width move smoothly with size, steps and
        noise, so that a cell with fewer rates is corrected like the others and measurement noise averages out.
      shape: that parabola, where it was found in another table.
    """
    if how in (GRID, VERTEX):
        return _cell_by_cell(table, how)
    if how != ACROSS:
        raise ValueError(f"learning rates are chosen by {GRID}, {VERTEX} or {ACROSS}, not {how!r}")
    shape = shape or shared_parabola(table)
    if shape is None:
        return _cell_by_cell(table, GRID)
    cell = tuple(table[name] for name in (PARAMETERS, ITERATIONS, RATIO))
    rate = shape.rate(*cell)
    distance = np.log2(table[LEARNING_RATE]) - np.log2(rate)
    at_vertex = np.log(table[LOSS]) - shape.width(*cell) * distance**2
    weight = 1 / (1 + distance**4)  # a rate far from the best says least about it
    _, first, inverse = _groups(table, (PARAMETERS, ITERATIONS, RATIO))
    inverse = inverse.reshape(-1)
    log_loss = np.bincount(inverse, weight * at_vertex) / np.bincount(inverse, weight)
    return Points(*(column[first] for column in cell), np.exp(log_loss), rate[first])


def _cell_by_cell(table: Table, how: str) -> Points:
    found = []
    for rows in _rows_of_groups(table, (PARAMETERS, ITERATIONS, RATIO)):
        rate, loss = np.log2(table[LEARNING_RATE][rows]), table[LOSS][rows]
        lowest = np.argmin(loss)
        log_rate, value, _ = (how == VERTEX and vertex(rate, loss)) or (rate[lowest], loss[lowest], 0.0)
        found.append(
            (table[PARAMETERS][rows[0]], table[ITERATIONS][rows[0]], table[RATIO][rows[0]], value, 2.0**log_rate)
        )
    return Points(*np.array(found).T)


@dataclasses.dataclass(frozen=True)
class SharedParabola:
    """ln loss = ln of the best loss + width (log2 rate - log2 best rate)^2, best rate and width functions of size,
    steps and noise.
    """

    rate: LearningRate
    log_width: LearningRate

    def width(self, parameters, steps, ratio):
        return np.exp(np.log2(self.log_width(parameters, steps, ratio)))


def shared_parabola(table: Table) -> SharedParabola | None:
    """Fits a SharedParabola to the cells that have a parabola of their own; None if too few have one."""
    cells, rates, widths = [], [], []
    for rows in _rows_of_groups(table, (PARAMETERS, ITERATIONS, RATIO)):
        own = vertex(np.log2(table[LEARNING_RATE][rows]), table[LOSS][rows])
        if own is not None:
            cells.append([table[name][rows[0]] for name in (PARAMETERS, ITERATIONS, RATIO)])
            rates.append(own[0])
            widths.append(np.log(own[2]))
    if len(cells) < _FEWEST_PARABOLAS:
        return None
    columns = np.array(cells).T
    return SharedParabola(fit_learning_rate(*columns, np.array(rates)), fit_learning_rate(*columns, np.array(widths)))


def vertex(log_rate: np.ndarray, loss: np.ndarray) -> tuple[float, float, float] | None:
    """(log2 of the best learning rate, its loss, width) of the parabola through ln loss; None where there is no such
    thing.
    """
    if len(np.unique(log_rate)) < 3:
        return None
    centre, spacing = log_rate.mean(), np.ptp(log_rate) / (len(np.unique(log_rate)) - 1)
    a, b, c = np.polyfit(log_rate - centre, np.log(loss), 2)
    if a <= 0:
        return None
    x = -b / (2 * a)
    low, high = log_rate.min() - centre - _REACH * spacing, log_rate.max() - centre + _REACH * spacing
    if not low <= x <= high:
        return None
    # A parabola through noisy losses must not promise more than a fraction of what the best of them reached.
    return centre + x, float(max(np.exp(c - b * b / (4 * a)), 0.9 * loss.min())), float(a)


def published(table: Table) -> Points:
    """Steps 1 and 2 of the published pipeline: warm-up cut, both isotonic regressions, the lowest of the learning
    rates.
    """
    table = usable(table)
    return best(smoothed(after_warm_up(table, default_warm_up(table))), GRID)


def revised(table: Table) -> Points:
    """The points of a table, with one parabola across the learning rates of all runs."""
    return of_kept_runs(kept_runs(table))[0]


def of_kept_runs(table: Table) -> tuple[Points, SharedParabola | None]:
    """(the points of runs that are sound, the parabola across their learning rates)."""
    table = smoothed(with_fewer_steps(averaged(ends_of_falling_rates(settled(table)))))
    shape = shared_parabola(table)
    return best(table, ACROSS, shape), shape


def thinned(points: Points) -> Points:
    """At most about _MOST_POINTS points, of each curve as many, evenly spaced in ln T, with its ends."""
    rows_of_curves = _rows_of_columns(np.stack([points.parameters, points.ratio], axis=-1))
    count = int(np.clip(_MOST_POINTS // len(rows_of_curves), _LEAST_OF_A_CURVE, _MOST_OF_A_CURVE))
    kept = np.zeros(len(points), bool)
    for rows in rows_of_curves:
        log_steps = np.log(points.steps[rows])
        wanted = np.linspace(log_steps.min(), log_steps.max(), count)
        kept[rows[np.abs(log_steps[:, None] - wanted).argmin(axis=0)]] = True
    return points.where(kept)


def _groups(table: Table, names: tuple[str, ...]):
    keys = np.stack([table[name] for name in names], axis=-1)
    return np.unique(keys, axis=0, return_index=True, return_inverse=True)


def _rows_of_groups(table: Table, names: tuple[str, ...]) -> list[np.ndarray]:
    """The numbers of the rows that agree in the named columns, group by group."""
    return _rows_of_columns(np.stack([table[name] for name in names], axis=-1))


def _rows_of_columns(columns: np.ndarray) -> list[np.ndarray]:
    """The numbers of the rows of an array [n, d] that agree, group by group."""
    inverse = np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
