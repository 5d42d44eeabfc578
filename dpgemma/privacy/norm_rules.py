"""Norms and weighted sums of per-example gradients out of what a single backward pass leaves, without the gradients
themselves.

Of every product y = x W the backward pass keeps the input x and the output's cotangent g of each example (the
book-keeping of Bu et al. 2023, arXiv 2210.00038): the gradient's squared norm |x' g|^2 follows from them in one of two
ways, and so does the sum over the examples of factor * x' g. Norm and sum are made from the very same arrays, which is
what makes the sum's bound provable in bfloat16: in a second backward pass everything would be rounded anew.

Formal guarantee: `weighted_sum` of one example, with a factor of at most C / `Norms.bound`, has L2 norm at most C, for
every input. What a lower type rounds of the scaled operand is bounded, and so is what float32 sums lose: at most n unit
roundoffs for n terms in any order (Higham 2002, section 4.2), because whoever writes an example may choose one whose
roundings all go one way. Tested by
tests/privacy/released_norm_test.py::test_pitfall_12_released_norm_never_exceeds_clip_norm and
::test_roundings_that_all_go_one_way_are_paid_for and ::test_rows_that_cancel_each_other_are_paid_for, and term by term
by tests/privacy/norms_test.py::test_the_slack_of_inner_products_is_what_their_roundings_may_add_up_to.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.privacy import norms, operations
from dpgemma.privacy.operations import EMBEDDING, HEAD, LINEAR, PRECISION, VECTOR
from dpgemma.privacy.tracking import UntrackedUse, Use

# Time of a floating-point operation of each way to a product's norm, relative to that of an ordinary product:
# "instantiate" forms the gradient of one example and squares it, "gram" multiplies the T x T inner products of inputs
# and of cotangents. On TPU from the compiler's cycles for a layer of VaultGemma; equal on CPU (0.99 and 0.97 by
# experiments/benchmarks/norm_rules.py) and where not measured.
COSTS = {"tpu": {"instantiate": 1.7, "gram": 1.4}}

_ROUNDOFF = 2.0**-24
# The largest number whose square is below the smallest normal float32.
_FLUSHED = 2.0**-63
_dot = functools.partial(jnp.einsum, precision=PRECISION, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norms:
    """Squared gradient norms of the examples [B], with two bounds on their rounding errors.

    Attributes:
      square: squared norm of the gradient, as computed.
      slack: by how much the exact square may be larger.
      radius_square: square of the distance by which a weighted gradient may miss the exact one, for a factor of 1.
    """

    square: jax.Array
    slack: jax.Array
    radius_square: jax.Array

    def __add__(self, other: "Norms") -> "Norms":
        return jax.tree.map(jnp.add, self, other)

    @property
    def norm(self) -> jax.Array:
        return jnp.sqrt(jnp.maximum(self.square, 0.0))

    @property
    def bound(self) -> jax.Array:
        """At least the norm of what is released per unit of the factor."""
        return jnp.sqrt(jnp.maximum(self.square, 0.0) + self.slack) + jnp.sqrt(self.radius_square)


def _sum_error(*terms: int) -> float:
    """Bound of the relative error of nested float32 sums of products with so many terms, added in any order."""
    return math.expm1(_ROUNDOFF * (sum(terms) + 2))


def _unit_roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def norm_rule(rows: int, fan_in: int, fan_out: int, platform: str) -> str:
    """The cheaper way to the norm of a product's gradient, from static shapes: "instantiate" or "gram"."""
    costs = COSTS.get(platform, {"instantiate": 1.0, "gram": 1.0})
    instantiate = 2.0 * rows * fan_in * fan_out * costs["instantiate"]
    gram = 2.0 * rows * rows * (fan_in + fan_out) * costs["gram"]
    return "gram" if gram < instantiate else "instantiate"


def _square_sum(x: jax.Array) -> Any:
    """Sum of squares over all axes."""
    return _by_axes(jnp.square(x.astype(jnp.float32)))


def _by_axes(x: jax.Array) -> Any:
    """Sum over all axes, one axis after the other: no sum is longer than an axis."""
    while x.ndim:
        x = norms.apart(x.sum(axis=-1))
    return x


def _lengths(x_TxP: jax.Array) -> Any:
    return jnp.sqrt(jnp.square(x_TxP.astype(jnp.float32)).sum(axis=-1))


def _instantiated(x_TxP: jax.Array, g_KxTxQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    def of_chunk(g_TxQ: jax.Array) -> Any:
        return _square_sum(_dot("tp,tq->pq", x_TxP, g_TxQ))

    square = of_chunk(g_KxTxQ[0]) if len(g_KxTxQ) == 1 else jax.lax.map(of_chunk, g_KxTxQ).sum()
    return square, square * _sum_error(x_TxP.shape[1], *g_KxTxQ.shape)


def _gram(x_TxP: jax.Array, g_KxTxQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = x_TxP.shape[0]

    def of_chunk(total: Any, g_TxQ: jax.Array) -> tuple[Any, Any]:
        return (total + _dot("tq,sq->ts", g_TxQ, g_TxQ), None)

    g_TxT, _ = jax.lax.scan(of_chunk, jnp.zeros((length, length)), g_KxTxQ)
    x_TxT = _dot("tp,sp->ts", x_TxP, x_TxP)
    square = _by_axes(x_TxT * g_TxT)
    # With inner products X + dX and G + dG as computed, where |dX_ts| is at most e_x |x_t| |x_s| and |dG_ts| at most
    # e_g |g_t| |g_s|, what is summed misses XG by |dX| |G + dG| + |X + dX| |dG| + |dX| |dG| at most, and the sum by its
    # own error. Rows may cancel each other, so none of these is small beside the square itself.
    x_T, g_T = _lengths(x_TxP), _chunked_lengths(g_KxTxQ)
    e_x, e_g = _sum_error(x_TxP.shape[1]), _sum_error(g_KxTxQ.shape[0], g_KxTxQ.shape[2])

    def over_pairs(pairs_TxT: jax.Array, lengths_T: jax.Array) -> Any:
        return _by_axes(jnp.abs(pairs_TxT) * lengths_T[:, None] * lengths_T)

    slack = e_x * over_pairs(g_TxT, x_T) + e_g * over_pairs(x_TxT, g_T)
    slack += e_x * e_g * jnp.square(jnp.sum(x_T * g_T)) + _sum_error(2 * length) * _by_axes(jnp.abs(x_TxT * g_TxT))
    return square, slack * _own_error(x_TxP.shape[1], g_KxTxQ.shape[0], g_KxTxQ.shape[2], 2 * length)


def _chunked_lengths(g_KxTxQ: jax.Array) -> Any:
    """Lengths [T] of rows whose columns come in K chunks."""
    return jnp.sqrt(norms.apart(jnp.square(g_KxTxQ.astype(jnp.float32)).sum(axis=-1)).sum(axis=0))


def _own_error(*terms: int) -> float:
    """By what a computed bound, all of whose sums have positive terms, so many in each, is multiplied to hold."""
    return 1 + 4 * _sum_error(*terms)


def _product_norms(x_TxP: jax.Array, g_KxTxQ: jax.Array, platform: str) -> Norms:
    """Of the gradient x' g of one example, where the columns of g come in K chunks."""
    chunks, length, size = g_KxTxQ.shape
    rule = norm_rule(length, x_TxP.shape[1], chunks * size, platform)
    square, slack = {"instantiate": _instantiated, "gram": _gram}[rule](x_TxP, g_KxTxQ)
    # x is scaled and rounded once more, entry by entry; sums over positions are rounded here and in weighted_sum.
    missed = _unit_roundoff(x_TxP.dtype) + 2 * _sum_error(length)
    missed *= 1 + _sum_error(x_TxP.shape[1], chunks, size, length)  # the lengths below are sums themselves
    x_lengths = _lengths(x_TxP)
    g_lengths = _chunked_lengths(g_KxTxQ)
    # Squares below the smallest float32 vanish, however large the numbers that they are multiplied with.
    x_whole, g_whole = jnp.linalg.norm(x_lengths), jnp.linalg.norm(g_lengths)
    flushed = _FLUSHED * (math.sqrt(g_KxTxQ.size) * x_whole + math.sqrt(x_TxP.size) * g_whole)
    radius = missed * jnp.sum(x_lengths * g_lengths) + flushed
    return Norms(square, slack, jnp.square(radius))


def _vector_norms(gradient: jax.Array) -> Norms:
    square = _square_sum(gradient)
    return Norms(square, square * (_sum_error(*gradient.shape) + 8 * _ROUNDOFF), jnp.zeros(()))


def _row_norms(ids_T: jax.Array, g_TxD: jax.Array) -> Norms:
    """Returns the Norms of the gradient that adds g_t to the row of word id_t. The summed row of a word that occurs c
    times appears c times, each with weight 1 / c.
    """
    same_TxT = (ids_T[:, None] == ids_T[None, :]).astype(jnp.float32)
    rows_TxD = _dot("ts,sd->td", same_TxT, g_TxD.astype(jnp.float32))
    square = jnp.sum(jnp.square(rows_TxD).sum(axis=-1) / same_TxT.sum(axis=-1))
    radius = 2 * _sum_error(len(ids_T)) * (1 + _sum_error(*g_TxD.shape)) * jnp.sum(_lengths(g_TxD))
    return Norms(square, square * _sum_error(*g_TxD.shape), jnp.square(radius))


def _tied_norms(rows: dict[str, Any], head: dict[str, Any], platform: str) -> Norms:
    """Of an embedding that is looked up at the input and multiplies the head: two gradients that meet in the rows of
    input words.
    """
    ids_T, g_TxD, h_TxD, delta_KxTxC = rows["ids"].astype(jnp.int32), rows["g"], head["h"], head["delta"]
    one, two = _row_norms(rows["ids"], g_TxD), _product_norms(h_TxD, delta_KxTxC, platform)
    chunk = delta_KxTxC.shape[2]
    delta_SxT = delta_KxTxC[
        ids_T // chunk, :, ids_T % chunk
    ]  # the head's delta at every t for the word at input position s
    rows_SxD = _dot("st,td->sd", delta_SxT, h_TxD)
    cross = _by_axes(g_TxD.astype(jnp.float32) * rows_SxD)
    # A row misses the exact one by a share of the lengths that are added up in it, which may cancel each other.
    added_S = jnp.sum(jnp.abs(delta_SxT.astype(jnp.float32)) * _lengths(h_TxD), axis=-1)
    terms = (*g_TxD.shape, 2 * len(ids_T))
    slack = jnp.sum(_lengths(g_TxD) * added_S) * (_sum_error(len(ids_T)) + _sum_error(*terms)) * _own_error(*terms)
    # Both miss the exact gradient in the same entries, so their distances add.
    radius = jnp.sqrt(one.radius_square) + jnp.sqrt(two.radius_square)
    return Norms(one.square + two.square + 2 * cross, one.slack + two.slack + 2 * slack, jnp.square(radius))


def example_norms(taps: dict[str, Any], platform: str) -> Norms:
    """Norms of one parameter's gradient by one example, in one layer.

    Args:
      taps: for the rules by which the parameter is used, what the backward pass kept.
    """
    match sorted(taps):
        case [operations.VECTOR]:
            return _vector_norms(**taps[VECTOR])
        case [operations.LINEAR]:
            return _product_norms(taps[LINEAR]["x"], taps[LINEAR]["g"][None], platform)
        case [operations.EMBEDDING]:
            return _row_norms(taps[EMBEDDING]["ids"], taps[EMBEDDING]["g"])
        case [operations.HEAD]:
            return _product_norms(taps[HEAD]["h"], taps[HEAD]["delta"], platform)
        case [operations.EMBEDDING, operations.HEAD]:
            return _tied_norms(taps[EMBEDDING], taps[HEAD], platform)
    raise UntrackedUse(f"no rule gives the norm of a parameter that is used by {' and '.join(sorted(taps))}")


def weighted_sum(use: Use, taps: dict[str, Any], factors_B: jax.Array, keep_B: jax.Array) -> Any:
    """Sum over the examples of factor * gradient [*use.shape] in float32, for one use of a parameter in one layer.

    Args:
      taps: what the backward pass kept, with a leading axis of B examples.
      factors_B: float32.
      keep_B: bool; an example that is not kept contributes exact zeros, whatever it holds.
    """
    # Selects, not products with zero: 0 * inf is NaN, and the factor of a bad example may be NaN itself.
    factors_B = jnp.where(keep_B, factors_B, 0.0)

    def axes(x: jax.Array) -> Any:
        return (len(x), *[1] * (x.ndim - 1))

    def kept(x: jax.Array) -> Any:
        return jnp.where(keep_B.reshape(axes(x)), x, 0)

    def scaled(x: jax.Array) -> Any:
        return (kept(x).astype(jnp.float32) * factors_B.reshape(axes(x))).astype(x.dtype)

    match use.rule:
        case operations.VECTOR:
            gradient = taps["gradient"].astype(jnp.float32)
            return (kept(gradient) * factors_B.reshape(axes(gradient))).sum(axis=0)
        case operations.LINEAR:
            return _dot("np,nq->pq", _rows(scaled(taps["x"])), _rows(kept(taps["g"]))).reshape(use.shape)
        case operations.EMBEDDING:
            rows_NxD = _rows(scaled(taps["g"].astype(jnp.float32)))
            return operations.add_rows(jnp.zeros(use.shape), taps["ids"].astype(jnp.int32).reshape(-1), rows_NxD)
        case operations.HEAD:
            words_KxCxD = _dot("bktc,btd->kcd", kept(taps["delta"]), scaled(taps["h"]))
            return words_KxCxD.reshape(-1, use.shape[1])[: use.shape[0]]


def _rows(x_BxTxP: jax.Array) -> Any:
    return x_BxTxP.reshape(-1, x_BxTxP.shape[-1])
