"""At most k rows of every unit: which ones, where it has more.

Formal guarantee: which rows of a unit are kept is a function of its own number of rows, of its number and of a secret
key; so it tells nothing of other units. Where rows are chosen at random, every set of k of them is as likely as any
other, given that ChaCha20 is a pseudo-random function. Tested by
tests/data/grouped_test.py::test_rows_beyond_the_limit_are_chosen_uniformly_by_the_secret_key.
"""

import dataclasses
from typing import Protocol

import numpy as np

from dpgemma.choices import FIRST_ROWS
from dpgemma.data.source import places_of
from dpgemma.data.spec import RowSpec
from dpgemma.privacy import keystream

_AT_ONCE = 1 << 20


class RowStore(Protocol):
    """Rows by number, those of a unit adjacent, in time and memory proportional to what is asked for.

    Attributes:
      spec: the columns of a row.
      num_units: units that there are.
    """

    @property
    def spec(self) -> RowSpec: ...

    @property
    def num_units(self) -> int: ...

    def first_rows(self, units: np.ndarray) -> np.ndarray:
        """The number of the first row of each unit; at `num_units` that of all rows. int64 [n]"""
        ...

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Every column [n, ...] of the rows with these numbers."""
        ...

    def fingerprint(self, key: bytes) -> str:
        """A keyed hash of everything that is stored."""
        ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many rows of a unit are kept.

    Attributes:
      rows_per_unit: k, at most.
      rows_kept: "uniform" for k rows at random, "first" for the first k.
      secret: key of the choice.
    """

    rows_per_unit: int
    rows_kept: str
    secret: bytes = dataclasses.field(repr=False)


ONE_ROW = Limits(1, FIRST_ROWS, b"")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Units with the rows that are kept of each.

    Attributes:
      store: all rows.
      limits: how many are kept; k is `max_rows`.
    """

    store: RowStore
    limits: Limits

    @property
    def spec(self) -> RowSpec:
        return self.store.spec

    @property
    def num_units(self) -> int:
        return self.store.num_units

    @property
    def max_rows(self) -> int:
        return self.limits.rows_per_unit

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        k, first = self.max_rows, self.store.first_rows(units)
        counts = self.store.first_rows(units + 1) - first
        kept = np.minimum(counts, k)
        owner = np.repeat(np.arange(len(units)), kept)
        numbers = first[owner] + places_of(owner)
        if self.limits.rows_kept != FIRST_ROWS:
            key = keystream.derive(self.limits.secret, "rows of units")
            ends = np.cumsum(kept)
            for i in np.flatnonzero(counts > k):
                order = np.argsort(keystream.uniform_uint64(key, int(units[i]), int(counts[i])), kind="stable")
                numbers[ends[i] - k : ends[i]] = first[i] + np.sort(order[:k])
        return self.store.rows(numbers), owner

    def left_out(self) -> tuple[int, int]:
        """(units that have more rows than are kept, rows of them that are left out): facts about private data."""
        units = rows = 0
        for begin in range(0, self.num_units, _AT_ONCE):
            end = min(begin + _AT_ONCE, self.num_units)
            beyond = np.diff(self.store.first_rows(np.arange(begin, end + 1))) - self.max_rows
            units, rows = units + int((beyond > 0).sum()), rows + int(beyond[beyond > 0].sum())
        return units, rows

    def fingerprint(self, key: bytes) -> str:
        return self.store.fingerprint(key)
