"""The batch of a step: privacy units in slots, each with the same number of places for its rows.

Shape letters: B slots, k places for rows in a slot.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dpgemma.data.source import UnitSource, places_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unit:
    """One privacy unit, as an objective sees it.

    >>> unit = Unit({"x": np.ones((3, 2))}, real=np.array([True, True, False]))  # two rows, and a place without one
    >>> int(unit.real.sum())
    2

    Attributes:
      rows: tree of arrays [k, ...]; the unit's rows come first, what stands behind them has no meaning.
      real: bool [k]; which places hold a row.
    """

    rows: Any
    real: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The drawn units in their slots; slots without a unit are padding. All shapes are public constants.

    Attributes:
      rows: tree of arrays [B, k, ...].
      real: bool [B, k]; the rows of a unit come first in its slot, so a slot is taken where its first place is.
    """

    rows: Any
    real: Any

    @classmethod
    def of_rows(cls, rows: Any, mask: Any) -> "Batch":
        """Units of one row each.

        >>> Batch.of_rows({"x": np.zeros((4, 7))}, np.array([True, True, True, False])).rows["x"].shape
        (4, 1, 7)

        Args:
          rows: tree of arrays [B, ...].
          mask: bool [B]; false marks padding.
        """
        return cls(jax.tree.map(lambda x: x[:, None], rows), mask[:, None])

    @property
    def slots(self) -> int:
        """B, taken slots and padding together."""
        return int(self.real.shape[0])

    @property
    def places(self) -> int:
        """k, places for rows in a slot."""
        return int(self.real.shape[1])

    @property
    def mask(self) -> Any:
        """Bool [B]: the slots that hold a unit."""
        return self.real[:, 0]

    @property
    def units(self) -> Unit:
        """All slots as units with a leading axis B, to be mapped over or cut into windows."""
        return Unit(self.rows, self.real)

    def dealt(self, devices: int) -> "Batch":
        """The slots in another order: dealt out to the devices in turn (round-robin).

        The i-th of `devices` equal parts of the batch then holds every slot whose number is i modulo `devices`, so that
        each device has its units in front and the numbers of units differ by at most one.
        """

        def deal(x: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(np.swapaxes(x.reshape(-1, devices, *x.shape[1:]), 0, 1)).reshape(x.shape)

        return Batch(jax.tree.map(deal, self.rows), deal(self.real))


def collate(source: UnitSource, units: np.ndarray, slots: int, part: tuple[int, int] = (0, 1)) -> Batch:
    """The drawn units, or one part of them, in front and zeros behind. Units without a row take no slot.

    Where more units were declared than there are, the numbers beyond the last one stand for units without content.

    Formal guarantee: each drawn unit below `source.num_units` that has rows is in exactly one of the parts 0 .. n-1,
    once. Tested by
    tests/data/data_test.py::test_parts_hold_every_drawn_unit_once.

    Args:
      units: sorted numbers of the drawn units; of each part at most `slots`.
      part: (i, n): every n-th unit from the i-th on, as `Batch.dealt` deals them out. Only these are read.

    Raises:
      ValueError: a source whose rows are not in the order of their units, or more than `max_rows` of one: they would
        take the places of others.
    """
    first, parts = part
    if len(units) and units.min() < 0:
        raise ValueError("units have numbers from 0 on")
    units = units[units < source.num_units][first::parts]
    rows, owner = source.read(units)
    if (np.diff(owner) < 0).any() or (np.bincount(owner) > source.max_rows).any():
        raise ValueError(f"a source gave rows out of order, or more than max_rows={source.max_rows} of one unit")
    place = places_of(owner)
    slot = np.cumsum(place == 0) - 1
    real = np.zeros((slots, source.max_rows), bool)
    real[slot, place] = True
    padded = {}
    for name, column in source.spec.items():
        padded[name] = np.zeros((slots, source.max_rows, *column.shape), column.dtype)
        padded[name][slot, place] = rows[name]
    return Batch(padded, real)
