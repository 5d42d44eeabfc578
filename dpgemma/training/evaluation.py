"""Figures of units that are evaluated, and how sure they are."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpgemma.data.source import UnitSource
from dpgemma.objectives.protocol import Objective

# Rows at once, and the volume that they may have together.
_ROWS_AT_ONCE, _VOLUME_AT_ONCE = 32, 1 << 14
# Fewer units than these say little of how units differ.
_FEWEST_UNITS = 10


@dataclasses.dataclass(frozen=True)
class Measured:
    """Raw figures of units: no guarantee covers them.

    Attributes:
      owner: int64 [R], the unit of every row.
      numerators, denominators: float64 [R] by name; a figure is the sum of its numerators by that of its denominators.
    """

    owner: np.ndarray
    numerators: Mapping[str, np.ndarray]
    denominators: Mapping[str, np.ndarray]

    @property
    def units(self) -> int:
        """Units that were measured."""
        return len(np.unique(self.owner))

    def figures(self) -> dict[str, float]:
        """Every figure over all rows; NaN where there is nothing to divide by."""
        return {name: _ratio(above.sum(), self.denominators[name].sum()) for name, above in self.numerators.items()}

    def of_units(self) -> list[dict[str, float]]:
        """Every figure of each unit by itself."""
        _, number = np.unique(self.owner, return_inverse=True)
        sums = {
            name: (np.bincount(number, above), np.bincount(number, self.denominators[name]))
            for name, above in self.numerators.items()
        }
        return [
            {name: _ratio(above[unit], below[unit]) for name, (above, below) in sums.items()}
            for unit in range(self.units)
        ]

    @property
    def resamples_rows(self) -> bool:
        """Whether `interval` draws rows, because there are too few units."""
        return self.units < _FEWEST_UNITS

    def interval(self, name: str, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """An interval of a figure, by the percentile bootstrap (Efron 1979): units, or rows of few units, are drawn
        with replacement, and the figure is taken anew.
        """
        above, below = self.numerators[name], self.denominators[name]
        if not self.resamples_rows:
            _, number = np.unique(self.owner, return_inverse=True)
            above, below = np.bincount(number, above), np.bincount(number, below)
        rng, found = np.random.default_rng(seed), np.empty(resamples)
        for i in range(resamples):
            drawn = rng.integers(0, len(above), len(above))
            found[i] = _ratio(above[drawn].sum(), below[drawn].sum())
        low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else math.nan


def measure(
    objective: Objective,
    trainable: Any,
    frozen: Any,
    source: UnitSource,
    *,
    most: int | None = None,
    advance: Callable[[int], None] = lambda units: None,
) -> Measured:
    """An objective's figures of all units, or of the first `most`, row by row.

    Args:
      advance: is told how many more units were measured.
    """
    count = source.num_units if most is None else min(source.num_units, most)
    at_once = max(1, min(_ROWS_AT_ONCE, _VOLUME_AT_ONCE // objective.volume[1]))
    owners = [np.zeros(0, np.int64)]
    above: dict[str, list[np.ndarray]] = {}
    below: dict[str, list[np.ndarray]] = {}
    for first in range(0, count, at_once):
        units = np.arange(first, min(first + at_once, count))
        rows, owner = source.read(units)
        owners.append(units[owner])
        for start in range(0, len(owner), at_once):
            chunk = {name: _filled(column[start : start + at_once], at_once) for name, column in rows.items()}
            real = min(at_once, len(owner) - start)
            for name, (numerators, denominators) in objective.measures(trainable, frozen, chunk).items():
                above.setdefault(name, []).append(numerators[:real])
                below.setdefault(name, []).append(denominators[:real])
        advance(len(units))
    joined = ({name: np.concatenate(parts) for name, parts in each.items()} for each in (above, below))
    return Measured(np.concatenate(owners), *joined)


def _filled(column: np.ndarray, rows: int) -> np.ndarray:
    """The rows and zeros behind them, so that every call has the same shape."""
    filled = np.zeros((rows, *column.shape[1:]), column.dtype)
    filled[: len(column)] = column
    return filled
