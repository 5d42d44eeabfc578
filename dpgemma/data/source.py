"""Where privacy units come from. Hold-out and rows that are drawn one by one are sources that wrap another one."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dpgemma.data.spec import Column, RowSpec


class UnitSource(Protocol):
    """Privacy units by number.

    Attributes:
      spec: the columns of a row.
      num_units: units that there are; their numbers are 0 .. num_units - 1.
      max_rows: k, the most rows that a unit may have. It fixes shapes that anyone can see, so it is declared and never
        taken from the data.
    """

    @property
    def spec(self) -> RowSpec: ...

    @property
    def num_units(self) -> int: ...

    @property
    def max_rows(self) -> int: ...

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows of some units, in time and memory proportional to their number.

        Args:
          units: int64 [n], numbers of units.

        Returns:
          Every column [R, ...] of their rows, those of a unit adjacent; and for every row, which of the n units it
          belongs to, int64 [R], ascending.
        """
        ...

    def fingerprint(self, key: bytes) -> str:
        """A keyed hash of all units. It goes to private/: an unkeyed one would let anyone test a guess of the data."""
        ...


def places_of(owner: np.ndarray) -> np.ndarray:
    """The place of every row among those of its unit, int64 [R].

    >>> places_of(np.array([0, 0, 2, 2, 2]))
    array([0, 1, 0, 1, 2])

    Args:
      owner: int64 [R], the unit of every row, ascending.
    """
    return np.arange(len(owner)) - np.searchsorted(owner, owner)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Units whose rows lie in memory, as a source of all of them and as a store of rows (dpgemma.data.limits).

    Attributes:
      columns: arrays [R, ...] by name, the rows of a unit adjacent.
      first: int64 [num_units + 1]; unit u has the rows first[u] .. first[u + 1] - 1. None where every row is a unit.
      max_rows: k, the most rows that a unit may have.
    """

    columns: Mapping[str, np.ndarray]
    first: np.ndarray | None = None
    max_rows: int = 1

    def __post_init__(self) -> None:
        if len({len(column) for column in self.columns.values()}) != 1:
            raise ValueError("all columns must have the same number of rows")
        if self.first is None:
            return
        counts, rows = np.diff(self.first), len(next(iter(self.columns.values())))
        if self.first[0] != 0 or self.first[-1] != rows or (counts < 1).any() or (counts > self.max_rows).any():
            raise ValueError(
                f"the {rows} rows must be divided into units of at least one row and at most max_rows={self.max_rows}"
            )

    @property
    def spec(self) -> RowSpec:
        return {name: Column(column.shape[1:], column.dtype.name) for name, column in self.columns.items()}

    @property
    def num_units(self) -> int:
        return len(next(iter(self.columns.values()))) if self.first is None else len(self.first) - 1

    def first_rows(self, units: np.ndarray) -> np.ndarray:
        return units if self.first is None else self.first[units]

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: column[numbers] for name, column in self.columns.items()}

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        first = self.first_rows(units)
        counts = self.first_rows(units + 1) - first
        owner = np.repeat(np.arange(len(units)), counts)
        return self.rows(first[owner] + places_of(owner)), owner

    def fingerprint(self, key: bytes) -> str:
        digest = hashlib.blake2b(key=key, digest_size=32)
        for column in [*self.columns.values(), *([] if self.first is None else [self.first])]:
            digest.update(repr(column.shape).encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """What sources that wrap another one pass on.

    Attributes:
      source: the other one.
    """

    source: UnitSource

    @property
    def spec(self) -> RowSpec:
        return self.source.spec

    @property
    def max_rows(self) -> int:
        return self.source.max_rows

    def fingerprint(self, key: bytes) -> str:
        return self.source.fingerprint(key)


@dataclasses.dataclass(frozen=True)
class Subset(Wrapped):
    """Some units of another source, numbered anew.

    Attributes:
      source: the other one.
      numbers: int64 [n]; unit u is unit numbers[u] there.
    """

    numbers: np.ndarray

    @property
    def num_units(self) -> int:
        return len(self.numbers)

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return self.source.read(self.numbers[units])

    def fingerprint(self, key: bytes) -> str:
        numbers = hashlib.blake2b(self.numbers.tobytes(), key=key, digest_size=32).hexdigest()
        return f"{self.source.fingerprint(key)} {numbers}"


@dataclasses.dataclass(frozen=True)
class Items(Wrapped):
    """Every place for a row of every unit of another source, as a unit of one row or none, so that rows can be drawn
    one by one.

    Formal guarantee: item u k + i holds row i of unit u, or nothing where that unit has fewer rows; so a unit's content
    decides its own k items and no other. Tested by
    tests/data/grouped_test.py::test_items_are_the_rows_of_their_unit.

    Attributes:
      source: the other one; k is its max_rows.
    """

    @property
    def num_units(self) -> int:
        return self.source.num_units * self.source.max_rows

    @property
    def max_rows(self) -> int:
        return 1

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        owners, k = np.unique(units // self.source.max_rows), self.source.max_rows
        rows, owner = self.source.read(owners)
        held = owners[owner] * k + places_of(owner)
        # Where an asked item would stand among those that hold a row.
        at = np.minimum(np.searchsorted(held, units), max(len(held) - 1, 0))
        found = np.flatnonzero(held[at] == units) if len(held) else np.zeros(0, np.int64)
        return {name: column[at[found]] for name, column in rows.items()}, found
