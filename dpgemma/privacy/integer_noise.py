"""Gaussian noise of whole numbers, the same bits on every processor.

N is the sum of four independent draws, each under a key of its own. A draw is 2^20 J + U: J comes from a table whose
probabilities, multiples of 2^-59, are in proportion to exp(-j^2 / (2 * 32^2)), and U is uniform on 0 ... 2^20 - 1. So
the law of N is a cubic spline on cells of 2^20 points: the sum of the J is a discrete Gaussian of 64 cells, and four
uniform fillings make it smooth. Everything is arithmetic of 32-bit words; no float is rounded.

Formal guarantee: for every vector of whole numbers d, telling N from N + d, coordinate by coordinate independent, is no
easier than telling a Gaussian of standard deviation s = 2^26 (1 - accounting.mechanism.grid.SHORTFALL) from itself
shifted by |d|, but for an event of probability TAIL in each coordinate. Reason: between -11.5 s and 11.5 s the law F is
log-concave, so the best test of one coordinate is a threshold, and Phi^-1(F(t)) grows by at most 1/s from a point to
the next, so no threshold does better than against the Gaussian; further out it is compared with the law that goes on,
from a point where the growth rises, with the growth that it has there, and is log-concave too; coordinates compose as
Gaussians do (Dong, Roth and Su 2022, arXiv 1905.02383, corollary 3.3). Assumed: Threefry-2x32 under five
keys of 64 bits is as good as random words.
Tested by tests/privacy/integer_noise_test.py::test_the_law_hides_every_shift_as_a_gaussian_does, from the exact
probabilities, and ::test_the_sampler_follows_the_law.
"""

import functools
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from accounting.mechanism.grid import LAW_BITS

# in_parts(compute, rows, shared): compute(rows, number of the first of them, shared) of every part of the rows, joined.
InParts = Callable[[Callable[..., jax.Array], jax.Array, Any], jax.Array]

DRAWS = 4  # each under a key of its own; a fifth key is for the fillings

TABLE_DEVIATION = 32
COLUMNS = 1024
TABLE_BITS = 59
FILLING_BITS = 20

_CENTRE = COLUMNS // 2
_LOW_BITS = 27  # of a threshold below 2^49; the upper 22 stand beside the other outcome in one word
# Coordinates whose words are held at once.
_CHUNK = 2**16


@functools.cache
def weights() -> tuple[int, ...]:
    """The probabilities of J = -512 ... 511 in units of 2^-TABLE_BITS: whole numbers, the same on every machine."""
    exact = Context(prec=60)
    powers = [exact.exp(Decimal(-(j * j)) / (2 * TABLE_DEVIATION**2)) for j in range(-_CENTRE + 1, _CENTRE)]
    unit = exact.divide(Decimal(2**TABLE_BITS), sum(powers, Decimal(0)))
    rounded = [0, *(int(exact.multiply(power, unit).to_integral_value()) for power in powers)]
    rounded[_CENTRE] += 2**TABLE_BITS - sum(rounded)
    return tuple(rounded)


@functools.cache
def table() -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias table: column c gives c where 49 random bits are below its threshold, else its other outcome.

    Returns:
      uint32 [COLUMNS]: the upper 22 bits of the threshold, then 10 bits of the other outcome.
      uint32 [COLUMNS]: the lower 27 bits of the threshold.
    """
    column = 2**TABLE_BITS // COLUMNS
    left = list(weights())
    threshold, other = [0] * COLUMNS, list(range(COLUMNS))
    small = [c for c in range(COLUMNS) if left[c] < column]
    large = [c for c in range(COLUMNS) if left[c] >= column]
    while small:
        c, giver = small.pop(), large[-1]
        threshold[c], other[c] = left[c], giver
        left[giver] -= column - left[c]
        if left[giver] < column:
            small.append(large.pop())
    # What remains has exactly a column each, and is its own other outcome.
    assert all(left[c] == column for c in large)
    low = np.array([t % 2**_LOW_BITS for t in threshold], np.uint32)
    high = np.array([t >> _LOW_BITS for t in threshold], np.uint32)
    return high << np.uint32(10) | np.array(other, np.uint32), low


def draw(key_data: Any, first: Any, count: int) -> jax.Array:
    """int32 [count]: the noise of the coordinates (first, 0) ... (first, count - 1) of one array.

    Args:
      key_data: uint32 [DRAWS + 1, 2].
      first: uint32; with the place it makes the 64-bit counter of a coordinate.
    """
    counter = jnp.concatenate([jnp.full(count, first, jnp.uint32), jax.lax.iota(jnp.uint32, count)])

    def words(key: Any) -> tuple[jax.Array, jax.Array]:
        both = threefry_2x32((key[0], key[1]), counter)
        return both[:count], both[count:]

    def one(total: jax.Array, source: Any) -> tuple[jax.Array, None]:
        key, filling = source
        return total + _draw(*words(key), filling), None

    a, b = words(key_data[DRAWS])
    fillings = jnp.stack([a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16])
    total, _ = jax.lax.scan(one, jnp.zeros(count, jnp.int32), (key_data[:DRAWS], fillings))
    return total - DRAWS * (2**FILLING_BITS - 1) // 2


def _draw(a: jax.Array, b: jax.Array, filling: jax.Array) -> jax.Array:
    """2^20 J + U of two random words and 16 further bits."""
    high_and_other, low = (jnp.asarray(part) for part in table())
    column = a >> 22
    entry, threshold_low = (part.at[column].get(mode="promise_in_bounds") for part in (high_and_other, low))
    high, threshold_high = a & jnp.uint32(2**22 - 1), entry >> 10
    below = (high < threshold_high) | ((high == threshold_high) & (b >> 5 < threshold_low))
    outcome = jnp.where(below, column, entry & 1023).astype(jnp.int32) - _CENTRE
    return (outcome << FILLING_BITS) + (filling | (b & 15) << 16).astype(jnp.int32)


def add(total: jax.Array, key_data: Any, index: int, bits: int, in_parts: InParts | None = None) -> jax.Array:
    """An int32 array plus noise, modulo 2^32, whose standard deviation is 2^bits (bits <= LAW_BITS).

    Coarser noise than the finest is the finest, rounded to the coarser grid.

    Args:
      key_data: uint32 [DRAWS + 1, 2], of noise.noise_keys.
      index: of the array among those that share the keys.
      in_parts: divides the chunks of a large array among devices; the bits do not depend on it.
    """
    keys = jax.vmap(lambda data: _fold(data, index))(jnp.asarray(key_data))

    def noise(keys: Any, first: Any, count: int) -> jax.Array:
        fine, coarser = draw(keys, first, count), LAW_BITS - bits
        return fine if coarser == 0 else (fine + (1 << (coarser - 1))) >> coarser

    def add_to_chunks(chunks: jax.Array, first: Any, keys: Any) -> jax.Array:
        def add_to_one(i: Any, chunks: jax.Array) -> jax.Array:
            number = (i + first).astype(jnp.uint32)
            return chunks.at[i].add(noise(keys, number, _CHUNK))

        return jax.lax.fori_loop(0, len(chunks), add_to_one, chunks)

    flat = jnp.asarray(total).reshape(-1)
    whole = flat.size // _CHUNK
    parts = []
    if whole:
        chunks = flat[: whole * _CHUNK].reshape(whole, _CHUNK)
        parts.append((in_parts or _in_one)(add_to_chunks, chunks, keys).reshape(-1))
    if rest := flat.size - whole * _CHUNK:
        parts.append(flat[whole * _CHUNK :] + noise(keys, jnp.uint32(whole), rest))
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts)).reshape(total.shape)


def _in_one(compute: Any, rows: jax.Array, shared: Any) -> jax.Array:
    noised: jax.Array = compute(rows, jnp.int32(0), shared)
    return noised


def _fold(data: Any, index: int) -> Any:
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), index))
