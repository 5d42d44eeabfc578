"""A law from a table of optima, each of which says two things: what loss was reached, and that nothing else of the same
compute would have reached a lower one.

A form is fitted so that (a) it gives the losses, (b) at a row's compute no other choice of model, batch and steps is
better by it, (c) the lowest of its choices lies near the row's, and (d), where rows are the least compute within 1 % of
the best loss of all, as in table 2 of arXiv 2501.18914, more compute gains less than that, and less compute does not
reach it. Choices beyond the largest model of the table's grid are never compared: of a row at that end the size is a
bound, not an optimum.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from experiments.laws import forms
from experiments.laws.forms import Parametric

# What a residual of one stands for: in ln loss of a row, in ln loss by which a choice is better, in factors of two of
# the chosen batch and size.
_LOSS, _REGRET, _PLACE = 0.012, 0.005, 1.0
# Choices whose losses differ by this share weigh about the same in where a form's optimum is.
_NEAR = 0.004
_SATURATED = 0.01
_MOST_EVALUATIONS = 60


@dataclasses.dataclass(frozen=True)
class Choices:
    """Configurations that spend one compute under one budget: float64 arrays [n] of parameters, steps, batch size and
    noise-batch ratio.
    """

    parameters: np.ndarray
    steps: np.ndarray
    batch_size: np.ndarray
    ratio: np.ndarray


@dataclasses.dataclass(frozen=True)
class Optimum:
    """One row of the table.

    Attributes:
      parameters, steps, batch_size, ratio, loss: of the row.
      choices: what else its compute could have been spent on.
      cheaper: the choices of the next lower compute that the table's authors searched; None at the lowest.
      dearer: those of higher ones, one set for each.
    """

    parameters: float
    steps: float
    batch_size: float
    ratio: float
    loss: float
    choices: Choices
    cheaper: Choices | None
    dearer: tuple[Choices, ...]


def fit(rows: Sequence[Optimum], form: str, start: Parametric | None = None) -> Parametric:
    """The form that agrees best with the rows, by least squares that forgive what lies far off (soft L1).

    Args:
      start: an earlier fit to nearly the same rows, from which this one begins.
    """
    chosen = forms.FORMS_OF_OPTIMA[form]
    scale = start.scale if start else tuple(
        float(np.exp(np.mean([np.log(getattr(row, name)) for row in rows]))) for name in ("parameters", "steps")
    )  # fmt: skip
    low, high = np.array(chosen.low), np.array(chosen.high)
    table = _Stacked(rows)

    def residual(constants):
        return table.residual(Parametric(form, tuple(constants), scale))

    found = [
        optimize.least_squares(
            residual, np.clip(x, low + 1e-6, high - 1e-6), bounds=(low, high), loss="soft_l1",
            x_scale=np.full(len(low), 0.3), diff_step=1e-4, max_nfev=_MOST_EVALUATIONS,
        )
        for x in (chosen.starts if start is None else (start.constants,))
    ]  # fmt: skip
    best = min(found, key=lambda each: each.cost)
    return Parametric(form, tuple(map(float, best.x)), scale)


def leave_one_out(rows: Sequence[Optimum], whole: Parametric) -> list[Parametric]:
    """For each row the form fitted without it, and without rows that print the same optimum for another budget."""
    fits, by_row = {}, []
    for row in rows:
        kept = tuple(i for i, other in enumerate(rows) if (other.loss, other.parameters) != (row.loss, row.parameters))
        if kept not in fits:
            fits[kept] = fit([rows[i] for i in kept], whole.form, whole)
        by_row.append(fits[kept])
    return by_row


def best_choice(law: Parametric, choices: Choices) -> tuple[float, float, float]:
    """(parameters, batch size, steps) of the lowest loss."""
    i = int(np.argmin(law.loss(choices.parameters, choices.steps, choices.ratio)))
    return float(choices.parameters[i]), float(choices.batch_size[i]), float(choices.steps[i])


class _Stacked:
    """The rows with all their choices in one array, so that a form is evaluated once."""

    def __init__(self, rows: Sequence[Optimum]):
        self._rows = rows
        self._own = [np.array([getattr(row, name) for row in rows]) for name in ("parameters", "steps", "ratio")]
        self._losses = np.log([row.loss for row in rows])
        sets = [(i, c) for i, row in enumerate(rows) for c in (row.choices, row.cheaper, *row.dearer) if c is not None]
        self._all = [np.concatenate([getattr(c, name) for _, c in sets]) for name in ("parameters", "steps", "ratio")]
        ends = np.cumsum([len(c.ratio) for _, c in sets])
        parts = iter(slice(int(end) - len(c.ratio), int(end)) for (_, c), end in zip(sets, ends, strict=True))
        self._parts = [
            (next(parts), None if row.cheaper is None else next(parts), [next(parts) for _ in row.dearer])
            for row in rows
        ]

    def residual(self, law: Parametric) -> np.ndarray:
        own, loss = np.log(law.loss(*self._own)), np.log(law.loss(*self._all))
        found = [(own - self._losses) / _LOSS]
        for row, at, (here, below, above) in zip(self._rows, own, self._parts, strict=True):
            lowest = loss[here].min()
            best = min([lowest, *(loss[part].min() for part in above)])
            weight = np.exp(-(loss[here] - lowest) / _NEAR)
            places = [
                (weight @ np.log2(values) / weight.sum() - np.log2(own_value)) / _PLACE
                for values, own_value in (
                    (row.choices.batch_size, row.batch_size),
                    (row.choices.parameters, row.parameters),
                )
            ]
            too_cheap = 0.0 if below is None else max(0.0, best + _SATURATED - loss[below].min())
            regrets = np.array([max(0.0, at - lowest), max(0.0, at - best - _SATURATED), too_cheap]) / _REGRET
            found += [regrets, places]
        return np.concatenate(found)
