"""Figures of held-out units."""

import math
from typing import Any

import numpy as np

from dpgemma.data.source import UnitSource
from dpgemma.objectives.protocol import Objective

_ROWS_AT_ONCE = 32
# Units that are looked at. More would take hours and tell the mean no better: their share is random.
MOST_MEASURED = 1 << 17


def measure(objective: Objective, trainable: Any, frozen: Any, source: UnitSource) -> dict[str, float]:
    """An objective's figures of all units, or of the first MOST_MEASURED, row by row; empty where there are no units.

    Raw values of these units: the guarantee does not cover them.
    """
    totals: dict[str, tuple[float, float]] = {}
    count = min(source.num_units, MOST_MEASURED)
    for first in range(0, count, _ROWS_AT_ONCE):
        rows, owner = source.read(np.arange(first, min(first + _ROWS_AT_ONCE, count)))
        for start in range(0, len(owner), _ROWS_AT_ONCE):
            chunk = {name: _filled(column[start : start + _ROWS_AT_ONCE]) for name, column in rows.items()}
            for name, (numerator, denominator) in objective.measures(trainable, frozen, chunk).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + numerator, before[1] + denominator
    return {
        name: numerator / denominator if denominator else math.nan for name, (numerator, denominator) in totals.items()
    }


def _filled(column: np.ndarray) -> np.ndarray:
    """The rows and zeros behind them, so that every call has the same shape."""
    filled = np.zeros((_ROWS_AT_ONCE, *column.shape[1:]), column.dtype)
    filled[: len(column)] = column
    return filled
