"""A secret order of very many numbers that nothing stores: a keyed permutation with random access.

A Feistel network of ten rounds with AES-256 as its round function, on the smallest domain of an even number of bits;
numbers that leave the range are taken through it again (cycle walking, Black and Rogaway 2002). Ten rounds are those of
FF1 (NIST SP 800-38G).

Formal guarantee: `Permutation(key, size)` maps 0 .. size - 1 onto itself, one to one, for every key; that its order
tells nothing to those without the key rests on AES. Tested by tests/data/holdout_test.py.
"""

import dataclasses

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A permutation of 0 .. size - 1.

    Attributes:
      key: 32 secret bytes.
      size: at most 2^62.
    """

    key: bytes = dataclasses.field(repr=False)
    size: int

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """What each of the numbers int64 [n] becomes."""
        half = max(1, -(-(self.size - 1).bit_length() // 2))
        found = numbers.astype(np.uint64)
        walking = np.arange(len(found))
        while len(walking):
            found[walking] = self._mixed(found[walking], half)
            walking = walking[found[walking] >= np.uint64(self.size)]
        return found.astype(np.int64)

    def _mixed(self, numbers: np.ndarray, half: int) -> np.ndarray:
        mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
        left, right = numbers >> bits, numbers & mask
        encryptor = Cipher(algorithms.AES(self.key), modes.ECB()).encryptor()
        blocks = np.empty((len(numbers), 2), "<u8")
        for number in range(_ROUNDS):
            blocks[:, 0], blocks[:, 1] = right, number
            words = np.frombuffer(encryptor.update(blocks.tobytes()), "<u8").reshape(-1, 2)[:, 0]
            left, right = right, left ^ (words & mask)
        return (left << bits) | right
