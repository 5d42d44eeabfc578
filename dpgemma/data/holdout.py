"""Which units are held out: decided by a secret key and the unit's number, never by content.

Formal guarantee: the assignment of every unit is independent of all contents, so replacing one unit's content changes
neither the assignment nor the number of training units. Tested by
tests/data/data_test.py::test_pitfall_3_assignment_ignores_content.
"""

import numpy as np

from dpgemma.privacy import keystream


def held_out(secret: bytes, num_units: int, fraction: float) -> np.ndarray:
    """Bool [num_units]: true with probability `fraction`, a keyed hash of the unit's number (the ChaCha20 keystream at
    it).
    """
    hashes = keystream.uniform_uint64(keystream.derive(secret, "hold-out"), 0, num_units)
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
