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
import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from accounting.mechanism.grid import LAW_BITS

# in_shards(compute, array, number of the array, shared): the array, of which compute(shard, index of the shard's first
# coordinate along each axis, shared) has replaced every shard.
InShards = Callable[[Callable[..., jax.Array], jax.Array, int, Any], jax.Array]

DRAWS = 4  # each under a key of its own; a fifth key is for the fillings

TABLE_DEVIATION = 32
COLUMNS = 1024
TABLE_BITS = 59
FILLING_BITS = 20

_CENTRE = COLUMNS // 2
_LOW_BITS = 27  # of a threshold below 2^49; the upper 22 stand beside the other outcome in one word
# Coordinates whose words are held at once, or one row of an array if it is longer.
_CHUNK = 2**17
_TILE = 8  # rows that a TPU keeps together
_WORD = 2**32


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


def draw(key_data: Any, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """int32 [...]: the noise of coordinates of one array.

    Args:
      key_data: uint32 [DRAWS + 1, 2].
      rows, columns: uint32 [...], of one shape; together the 64-bit counter of a coordinate.
    """

    def words(key: Any) -> tuple[jax.Array, jax.Array]:
        a, b = threefry2x32_p.bind(key[0], key[1], rows, columns)
        return a, b

    def one(total: jax.Array, source: Any) -> tuple[jax.Array, None]:
        key, filling = source
        return total + _draw(*words(key), filling), None

    a, b = words(key_data[DRAWS])
    fillings = jnp.stack([a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16])
    total, _ = jax.lax.scan(one, jnp.zeros(rows.shape, jnp.int32), (key_data[:DRAWS], fillings))
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


def add(total: jax.Array, key_data: Any, index: int, bits: int, in_shards: InShards | None = None) -> jax.Array:
    """An int32 array plus noise, modulo 2^32, whose standard deviation is 2^bits (bits <= LAW_BITS).

    The noise of a coordinate is a function of the keys, the array's number and the coordinate's place in the whole
    array: its column is its place along the last axis, its row that along all others. Coarser noise than the finest is
    the finest, rounded to the coarser grid.

    Formal guarantee: every coordinate of the whole array is noised once, under a counter that no other coordinate of it
    has, on any mesh. Tested by tests/privacy/integer_noise_test.py::
    test_the_noise_of_a_coordinate_is_that_of_its_row_and_column and tests/sharding/tensor_test.py::
    test_noise_does_not_depend_on_the_mesh.

    Args:
      key_data: uint32 [DRAWS + 1, 2], of noise.noise_keys.
      index: of the array among those that share the keys.
      in_shards: how the array is spread over devices, each of which makes the noise of its own shard; the bits do not
        depend on it.

    Raises:
      ValueError: an array with more rows, or longer ones, than a counter can tell apart.
    """
    shape = total.shape
    if math.prod(shape[:-1]) > _WORD or math.prod(shape[-1:]) > _WORD:
        raise ValueError(f"an array of shape {shape} has more rows or columns than noise can be drawn for (2^32)")
    keys = jax.vmap(lambda data: _fold(data, index))(jnp.asarray(key_data))

    def add_to_shard(shard: jax.Array, first: Sequence[Any], keys: Any) -> jax.Array:
        table = shard.reshape(math.prod(shard.shape[:-1]), math.prod(shard.shape[-1:]))
        first_column = jnp.asarray(first[-1] if first else 0, jnp.uint32)

        def noise(first_row: Any, count: int) -> jax.Array:
            local = first_row + jax.lax.iota(jnp.uint32, count)
            rows = _rows_of_whole(local, shard.shape[:-1], shape[:-1], first[:-1])
            columns = first_column + jax.lax.iota(jnp.uint32, table.shape[1])
            fine = draw(keys, *(jnp.broadcast_to(x, (count, len(columns))) for x in (rows[:, None], columns)))
            coarser = LAW_BITS - bits
            return fine if coarser == 0 else (fine + (1 << (coarser - 1))) >> coarser

        fitting = max(1, _CHUNK // max(1, table.shape[1]))
        at_once = fitting // _TILE * _TILE or fitting
        whole = len(table) // at_once

        def add_to_rows(i: Any, table: jax.Array) -> jax.Array:
            first_row = i * at_once
            some = jax.lax.dynamic_slice_in_dim(table, first_row, at_once)
            noised = some + noise(jnp.asarray(first_row, jnp.uint32), at_once)
            return jax.lax.dynamic_update_slice_in_dim(table, noised, first_row, 0)

        if whole:
            table = jax.lax.fori_loop(0, whole, add_to_rows, table)
        if rest := len(table) - whole * at_once:
            table = table.at[-rest:].add(noise(jnp.uint32(whole * at_once), rest))
        return table.reshape(shard.shape)

    return (in_shards or _in_one)(add_to_shard, jnp.asarray(total), index, keys)


def _rows_of_whole(rows: jax.Array, shard: Sequence[int], whole: Sequence[int], first: Sequence[Any]) -> jax.Array:
    """uint32: which rows of the whole array these rows of a shard are.

    Args:
      shard, whole: shapes without the last axis.
      first: index of the shard's first coordinate along each of these axes.
    """
    found, stride = jnp.zeros_like(rows), 1
    for size, of_whole, start in zip(reversed(shard), reversed(whole), reversed(first), strict=True):
        found += (rows % size + jnp.asarray(start, jnp.uint32)) * jnp.uint32(stride)
        rows, stride = rows // size, stride * of_whole
    return found


def _in_one(compute: Any, array: jax.Array, number: int, shared: Any) -> jax.Array:
    noised: jax.Array = compute(array, [0] * array.ndim, shared)
    return noised


def _fold(data: Any, index: int) -> Any:
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), index))
