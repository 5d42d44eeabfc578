"""Random access to the ChaCha20 keystream (RFC 8439's block function) as 64-bit integers."""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms


def derive(secret: bytes, domain: str) -> bytes:
    """A 256-bit key for one purpose, from a secret of at least 128 bits."""
    if len(secret) < 16:
        raise ValueError("a secret key needs at least 128 bits")
    return hashlib.blake2b(domain.encode(), key=secret, digest_size=32, person=b"dpgemma key").digest()


def uniform_uint64(key: bytes, stream: int, count: int) -> np.ndarray:
    """The first `count` 64-bit integers of a stream; one stream for each value of `stream` in [0, 2^64)."""
    nonce = (0).to_bytes(8, "little") + stream.to_bytes(8, "little")  # block counter, then stream number
    keystream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(8 * count))
    return np.frombuffer(keystream, dtype="<u8")
