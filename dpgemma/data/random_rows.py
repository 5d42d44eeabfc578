"""Rows of random numbers, each computed from its number when it is read: data of any size for rehearsals."""

import dataclasses
import hashlib
from typing import ClassVar

import numpy as np

from accounting.errors import InputError
from accounting.mechanism.sampling import MOST_UNITS
from dpgemma.data.spec import RowSpec


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """Units of one row that nothing stores, so that a run of any number of units can be rehearsed.

    Whole numbers are uniform below `limit` (by SplitMix64, Steele et al. 2014, of the unit's number and the place in
    its row), truth values are true. Nothing in them is secret, or can be learned.

    Attributes:
      spec: the columns of a row.
      num_units: N.
      limit: of whole numbers.
    """

    PREFIX: ClassVar[str] = "random:"

    spec: RowSpec
    num_units: int
    limit: int
    max_rows: ClassVar[int] = 1

    @classmethod
    def named(cls, name: str, spec: RowSpec, limit: int) -> "RandomRows":
        """The rows that "random:N" names.

        Raises:
          InputError: N is no number of units.
        """
        try:
            count = float(name.removeprefix(cls.PREFIX))
        except ValueError:
            count = 0.5
        if not (1 <= count <= MOST_UNITS and count.is_integer()):
            raise InputError(f"`data`={name} needs a number of units between 1 and {MOST_UNITS:.0e}, as in random:1e6")
        return cls(spec, int(count), limit)

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = {}
        for name, column in self.spec.items():
            size = int(np.prod(column.shape))
            places = (units.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)).reshape(-1)
            numbers = np.ones(len(places), bool) if column.dtype == "bool" else _mixed(places) % np.uint64(self.limit)
            rows[name] = numbers.astype(column.dtype).reshape(len(units), *column.shape)
        return rows, np.arange(len(units))

    def fingerprint(self, key: bytes) -> str:
        facts = repr((self.num_units, self.limit, sorted(self.spec.items()))).encode()
        return hashlib.blake2b(facts, key=key, digest_size=32).hexdigest()


def _mixed(numbers: np.ndarray) -> np.ndarray:
    x = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
