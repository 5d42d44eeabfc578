"""L2 norms in float32 whose rounding error is known.

The order of additions is fixed: an ordinary reduction may add a million numbers in sequence, and its float32 result can then be too
small by more than any constant margin.
"""

import math

import jax
import jax.numpy as jnp

UNIT_ROUNDOFF = 2.0**-24
_FIRST_RADIX, _RADIX = 32, 8


def _first_fold(x):
    """Squares an array and sums up to 32 neighbours along its longest axis but the last, where no element has to be moved for it."""
    square = jnp.square(x.astype(jnp.float32))
    if x.ndim < 2:
        return square.reshape(-1)
    axis = max(range(x.ndim - 1), key=lambda i: x.shape[i])
    size = next(n for n in range(_FIRST_RADIX, 0, -1) if x.shape[axis] % n == 0)
    return square.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :]).sum(axis=axis + 1).reshape(-1)


def _fold(x):
    """Sums a vector eight to one: ceil(n / 8) sums of eight terms."""
    x = jnp.pad(x, (0, -x.size % _RADIX))
    return x.reshape(_RADIX, -1).sum(axis=0)


def square_sum(leaves: list) -> jax.Array:
    """The sum of the squares of all numbers in a list of arrays; inf or NaN where any square is."""
    return total([_fold(_first_fold(leaf)) for leaf in leaves])


def total(partial: list) -> jax.Array:
    """The sum of all numbers in a list of vectors."""
    partial = jnp.concatenate(partial)
    while partial.size > 1:
        partial = _fold(partial)
    return partial[0]


def l2_norm(tree) -> jax.Array:
    """The L2 norm over all leaves of a tree; inf or NaN where any square is."""
    return jnp.sqrt(square_sum(jax.tree.leaves(tree)))


def margin(tree) -> float:
    """By how much a clip factor is lowered, relatively, so that rounding can never carry a clipped gradient above the norm.

    With u = 2^-24 and a sum of squares in L folds of eight after one of 32, or in two stages of them, it is at least
    (1 - (1 + 31 + 7 L) u) times the true one, so the norm is low by at most half of that; square root, division, the rounded bound and
    the final product add one u each on hardware that rounds correctly and a few on hardware that does not.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(tree))
    # Folds that do not divide, and sums within layers before those across them, make no more than four folds beyond the logarithm.
    folds = math.ceil(math.log(max(size, _RADIX), _RADIX)) + 4
    return (4 * folds + 32) * UNIT_ROUNDOFF
