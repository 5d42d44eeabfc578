"""Which units are held out: decided by a secret key and the unit's number, never by content.

Formal guarantee: the assignment of every unit is independent of all contents, so replacing one unit's content by
another that can be read changes neither the assignment nor the number of training units. Tested by
tests/data/data_test.py::test_pitfall_3_assignment_ignores_content and, for very many units, by
tests/data/holdout_test.py.
"""

import dataclasses

import numpy as np

from accounting.errors import InputError
from dpgemma.data.permutation import Permutation
from dpgemma.data.source import Subset, UnitSource, Wrapped
from dpgemma.privacy import keystream

MOST_LISTED = 1 << 24


def held_out(secret: bytes, num_units: int, fraction: float) -> np.ndarray:
    """Bool [num_units]: true with probability `fraction`, by a keyed hash of the unit's number.

    The hash is the ChaCha20 keystream at the unit's number.
    """
    hashes = keystream.uniform_uint64(keystream.derive(secret, "hold-out"), 0, num_units)
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def split(
    source: UnitSource, secret: bytes, fraction: float, *, most_listed: int = MOST_LISTED
) -> tuple[UnitSource, UnitSource]:
    """(training units, held-out units).

    Of up to `most_listed` units the numbers of both are listed; of more, the last ones in a secret order are held out,
    exactly their share, and nothing is listed. That share follows the number of units, so where this number is private
    (add_or_remove) nobody may be held out of so many.

    Raises:
      InputError: nothing left to train on.
    """
    count = source.num_units
    if count > most_listed and fraction == 0:
        return source, Subset(source, np.zeros(0, np.int64))
    if count > most_listed:
        order = Permutation(keystream.derive(secret, "order of very many units"), count)
        training = count - round(fraction * count)
        return Reordered(source, order, 0, training), Reordered(source, order, training, count - training)
    is_held_out = held_out(secret, count, fraction)
    if is_held_out.all():
        raise InputError(f"all {count} units are held out: lower `holdout_fraction` or use more data")
    return Subset(source, np.flatnonzero(~is_held_out)), Subset(source, np.flatnonzero(is_held_out))


@dataclasses.dataclass(frozen=True)
class Reordered(Wrapped):
    """Units of another source in a secret order, from a place in it on.

    Attributes:
      source: the other one.
      order: unit u is unit order(first + u) there.
      first, num_units: where this part of the order begins, and how many units it has.
    """

    order: Permutation
    first: int
    num_units: int

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return self.source.read(self.order(units + self.first))

    def fingerprint(self, key: bytes) -> str:
        return f"{self.source.fingerprint(key)} {self.first} {self.num_units}"
