"""Which units are held out: decided by a secret key and the unit's number, never by content.

Formal guarantee: the assignment of every unit is independent of all contents, so replacing one unit's content changes
neither the assignment nor the number of training units. Tested by
tests/data/data_test.py::test_pitfall_3_assignment_ignores_content.
"""

import numpy as np

from accounting.errors import InputError
from dpgemma.data.source import Subset, UnitSource
from dpgemma.privacy import keystream


def held_out(secret: bytes, num_units: int, fraction: float) -> np.ndarray:
    """Bool [num_units]: true with probability `fraction`, by a keyed hash of the unit's number.

    The hash is the ChaCha20 keystream at the unit's number.
    """
    hashes = keystream.uniform_uint64(keystream.derive(secret, "hold-out"), 0, num_units)
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def split(source: UnitSource, secret: bytes, fraction: float) -> tuple[Subset, Subset]:
    """(training units, held-out units).

    Raises:
      InputError: nothing left to train on.
    """
    is_held_out = held_out(secret, source.num_units, fraction)
    if is_held_out.all():
        raise InputError(f"all {source.num_units} units are held out: lower `holdout_fraction` or use more data")
    return Subset(source, np.flatnonzero(~is_held_out)), Subset(source, np.flatnonzero(is_held_out))
