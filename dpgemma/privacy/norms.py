"""L2 norms in float32 whose rounding error is known.

An ordinary reduction may add a million numbers in sequence, and its float32 result can then be too small by more than
any constant margin. So a sum is one of sums, each of at most 8192 terms, which may be added in any order. Where an axis
is spread over devices, each adds its own part and then all parts are added: that is one of these orders.

Formal guarantee: no sum of a compiled program has more terms than the sums below are written with. XLA joins a sum of
sums into one, so every sum stands behind a barrier that it does not look across. Tested by
tests/privacy/norms_test.py::test_compilers_join_no_sums, for CPUs and, where its compiler is installed, for TPU v6e;
assumed for other devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

UNIT_ROUNDOFF = 2.0**-24
_RADIX, _LONGEST, _TILE, _DEVICES = 8, 8192, 8, 64


def column_squares(x: jax.Array) -> jax.Array:
    """The sums of the squares of a float array over all axes but the last, in float32: [last axis]."""
    if not is_long(x.shape):
        return column_sums(jnp.square(x.astype(jnp.float32)))
    # A compiler that divides into blocks behind the squares stores all of these.
    blocks = jax.lax.optimization_barrier(_in_blocks(x))
    return column_sums(apart(jnp.square(blocks.astype(jnp.float32)).sum(axis=1)))


def column_sums(x: jax.Array) -> jax.Array:
    """The sums of a float32 array over all axes but the last."""
    while x.ndim > 1:
        x = apart(_in_blocks(x).sum(axis=1) if is_long(x.shape) else x.sum(axis=_together(x.shape)))
    return x.reshape(-1)


def apart(summed: jax.Array) -> jax.Array:
    """A sum that no compiler joins with the sums that it is a term of."""
    return jax.lax.optimization_barrier(summed)


def is_long(shape: tuple[int, ...]) -> bool:
    """Whether the first axis of an array is divided into blocks, whose numbers are stored before they are squared."""
    return len(shape) > 1 and shape[0] > _LONGEST


def _in_blocks(x: jax.Array) -> jax.Array:
    """[blocks, length of a block, ...]; zeros fill the last block up."""
    blocks, length = _blocks(x.shape[0])
    x = jnp.pad(x, [(0, blocks * length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, length, *x.shape[1:])


def _blocks(length: int) -> tuple[int, int]:
    """How many blocks a long axis is divided into, and the length of one.

    If the length divides so, an accelerator's tiles stay whole, and up to 64 devices have equally many blocks each, so
    that no number has to change its place.

    >>> _blocks(256000), _blocks(12000)
    ((64, 4000), (4, 3000))
    """
    fewest = -(-length // _LONGEST)
    divisors = [blocks for blocks in range(fewest, length // _TILE + 1) if length % blocks == 0]
    if not divisors:
        return fewest, -(-length // fewest)
    return max(
        ((blocks, length // blocks) for blocks in divisors),
        key=lambda each: (each[1] % _TILE == 0, math.gcd(each[0], _DEVICES), -each[0]),
    )


def _together(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The first axes but the last of all, as many as have at most 8192 numbers together.

    >>> _together((26, 1152, 4, 256)), _together((1152, 4, 256))
    ((0,), (0, 1))
    """
    axes = [n for n in range(1, len(shape)) if n == 1 or math.prod(shape[:n]) <= _LONGEST]
    return tuple(range(axes[-1]))


def _additions(shape: tuple[int, ...]) -> int:
    """The most additions that any term passes through in column_squares."""
    total = 0
    while len(shape) > 1:
        if is_long(shape):
            blocks, length = _blocks(shape[0])
            total, shape = total + length - 1, (blocks, *shape[1:])
        else:
            axes = len(_together(shape))
            total, shape = total + math.prod(shape[:axes]) - 1, shape[axes:]
    return total


def _ways(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes under which the squares of an array may be added: its own, or [*layers, inputs, outputs], where a use
    takes the first axes behind those of layers together as inputs and the others as outputs.
    """
    merged = [
        (*shape[:layers], math.prod(shape[layers:inputs]), math.prod(shape[inputs:]))
        for layers in range(len(shape))
        for inputs in range(layers + 1, len(shape))
    ]
    return [shape, *merged]


def total(vectors: list[jax.Array]) -> jax.Array:
    """The sum of all numbers in a list of vectors."""
    partial = jnp.concatenate(vectors)
    while partial.size > 1:
        # Eight to one: ceil(n / 8) sums of eight terms.
        partial = apart(jnp.pad(partial, (0, -partial.size % _RADIX)).reshape(_RADIX, -1).sum(axis=0))
    return partial[0]


def square_sum(leaves: list[Any]) -> jax.Array:
    """The sum of the squares of all numbers in a list of arrays; inf or NaN where any square is."""
    return total([column_squares(leaf) for leaf in leaves])


def l2_norm(tree: Any) -> jax.Array:
    """The L2 norm over all leaves of a tree; inf or NaN where any square is."""
    return jnp.sqrt(square_sum(jax.tree.leaves(tree)))


def margin(tree: Any) -> float:
    """By how much a clip factor is lowered, relatively, so that rounding can never carry a clipped gradient above the
    norm.

    Where no term passes through more than n additions, with u = 2^-24, the computed sum of squares is at least (1 - (1
    + n) u) times the true one, so the norm is low by at most half of that; square root, division, the rounded bound and
    the final product add one u each on hardware that rounds correctly and a few on hardware that does not.
    """
    leaves = [leaf.shape or (1,) for leaf in jax.tree.leaves(tree)]
    # Column sums may be kept layer by layer, so that what `total` adds is longer than the last axes alone.
    longest = sum(max(way[-1] for way in _ways(shape)) * shape[0] for shape in leaves)
    folds = math.ceil(math.log(max(longest, _RADIX), _RADIX))
    additions = max((_additions(way) for shape in leaves for way in _ways(shape)), default=0) + (_RADIX - 1) * folds
    return (additions / 2 + 16) * UNIT_ROUNDOFF
