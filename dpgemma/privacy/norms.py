"""L2 norms in float32 whose rounding error is known.

The order of additions is fixed: an ordinary reduction may add a million numbers in sequence, and its float32 result can
then be too small by more than any constant margin. Sums run over leading axes, in runs of whole tiles, so that no
number has to change its place. Where an axis is spread over devices, each adds its own part and then all parts are
added, so that no term passes through more additions than on one device; the order is that of the mesh.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

UNIT_ROUNDOFF = 2.0**-24
_RADIX, _LONGEST, _TILE = 8, 64, 8


def _split(length: int) -> int:
    """How many terms of an axis are added at a time: at most 64, a divisor if there is one, leaving whole tiles if it
    can.
    """
    divisors = [n for n in range(2, min(length, _LONGEST) + 1) if length % n == 0]
    whole = [n for n in divisors if length // n % _TILE == 0]
    return max(whole or divisors, default=_LONGEST)


def column_squares(x: jax.Array) -> jax.Array:
    """The sums of the squares of a float array over all axes but the last, in float32: [last axis]."""
    return column_sums(jnp.square(x.astype(jnp.float32)))


def column_sums(x: jax.Array) -> jax.Array:
    """The sums of a float32 array over all axes but the last."""
    while x.ndim > 1:
        length = x.shape[0]
        if length == 1:
            x = x[0]
            continue
        terms = _split(length)
        x = jnp.pad(x, [(0, -length % terms)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(terms, -1, *x.shape[1:]).sum(axis=0)
    return x.reshape(-1)


def _additions(shape: tuple[int, ...]) -> int:
    """The most additions that any term passes through in column_squares."""
    total = 0
    for length in shape[:-1]:
        while length > 1:
            terms = _split(length)
            total, length = total + terms - 1, -(-length // terms)
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
        partial = jnp.pad(partial, (0, -partial.size % _RADIX)).reshape(_RADIX, -1).sum(axis=0)
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
