"""The operations through which parameters reach a loss. Each has a rule of the same name in `norm_rules`.

Given plain arrays, each is its own definition and nothing else. Given a `Tracked` box, it computes the same and leaves
in the cotangents of the box's taps what the rule needs of one example: nothing of this crosses examples, so it can be
mapped over them. Of a box that does not keep operands, it leaves the gradient's sum of squares instead, taken where the
gradient is made; only the rows that an embedding looks up are kept in any case, because a gradient of all words, zero
but for them, would be a waste.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.privacy import norms
from dpgemma.privacy.tracking import Tracked, Use, record

Weights = jax.Array | Tracked

VECTOR, LINEAR, EMBEDDING, HEAD = "vector", "linear", "embedding", "head"
SQUARES = "squares"
# By which add_rows multiplies a matrix of so many rows and columns.
_MOST_ROWS_BY_PRODUCT = 8192
# Without this, accelerators compute float32 products in reduced precision; it changes nothing for bfloat16 operands.
PRECISION = jax.lax.Precision.HIGHEST


def vector(w: Weights) -> Any:
    """A parameter that is small beside the activations (scale, bias, taps of a convolution, blocks of a gate), for any
    use whatever.

    Tracked, every example gets a copy of its own, whose gradient is that example's: exact for whatever is done with it.
    """
    if not isinstance(w, Tracked):
        return w
    if w.uses is not None:
        return record(w, Use(VECTOR, w.shape, {"gradient": jax.ShapeDtypeStruct(w.shape, w.dtype)}), w)
    if not w.keep:
        # With the barrier, which holds in the backward pass too, a gradient that is a mere sum is not made twice.
        return jax.lax.optimization_barrier(_measured(w.open(), w.taps.get(SQUARES)))
    return jax.lax.stop_gradient(w.open()) + w.taps[VECTOR]["gradient"]


def linear(x: jax.Array, w: Weights, inputs: int = 1) -> Any:
    """x [..., in...] times w [in..., out...], of which the first `inputs` axes are contracted; the result is [...,
    out...].

    As one product of two matrices: with several free axes XLA's CPU backend takes up to twice as long for the
    gradients.
    """
    fan_in, fan_out = math.prod(w.shape[:inputs]), math.prod(w.shape[inputs:])
    shape = (*x.shape[: x.ndim - inputs], *w.shape[inputs:])
    if not isinstance(w, Tracked):
        return _product(x.reshape(-1, fan_in), w.reshape(fan_in, fan_out)).reshape(shape)
    if w.uses is not None:
        rows = x.size // fan_in
        taps = {"x": jax.ShapeDtypeStruct((rows, fan_in), x.dtype), "g": jax.ShapeDtypeStruct((rows, fan_out), x.dtype)}
        return record(w, Use(LINEAR, w.shape, taps, inputs), jax.ShapeDtypeStruct(shape, x.dtype), x)
    matrix = w.open().reshape(fan_in, fan_out)
    if not w.keep:
        return _product(x.reshape(-1, fan_in), _measured(matrix, w.taps.get(SQUARES))).reshape(shape)
    return _tracked_product(x.reshape(-1, fan_in), matrix, w.taps[LINEAR]).reshape(shape)


def _product(x_NxP: jax.Array, w_PxQ: jax.Array) -> Any:
    return jnp.matmul(x_NxP, w_PxQ.astype(x_NxP.dtype), precision=PRECISION)


@jax.custom_vjp
def _tracked_product(x_NxP: jax.Array, w_PxQ: jax.Array, taps: Any) -> Any:
    return _product(x_NxP, w_PxQ)


def _tracked_product_forward(x_NxP: jax.Array, w_PxQ: jax.Array, taps: Any) -> tuple[Any, Any]:
    return _product(x_NxP, w_PxQ), (x_NxP, w_PxQ)


def _tracked_product_backward(residuals: Any, g_NxQ: jax.Array) -> tuple[Any, Any, Any]:
    x_NxP, w_PxQ = residuals
    return _product(g_NxQ, w_PxQ.T), None, {"x": x_NxP, "g": g_NxQ}


_tracked_product.defvjp(_tracked_product_forward, _tracked_product_backward)


def _measured(w: jax.Array, tap: Any) -> Any:
    """The parameter itself; where there is a tap, with the column sums of its gradient's squares in the tap's
    cotangent.
    """
    return w if tap is None else _with_squares(w, tap)


@jax.custom_vjp
def _with_squares(w: jax.Array, tap: Any) -> Any:
    return w


def _with_squares_backward(_: Any, gradient: jax.Array) -> tuple[Any, Any]:
    rounded = gradient.astype(jnp.float32)
    if gradient.dtype != jnp.float32:
        # A cast may be left out by a compiler, so that it would square other numbers than those that it stores; this
        # may not.
        kind = jnp.finfo(gradient.dtype)
        rounded = jax.lax.reduce_precision(rounded, kind.nexp, kind.nmant)
    stored = rounded.astype(gradient.dtype)
    return stored, norms.column_squares(stored if norms.is_long(stored.shape) else rounded)


_with_squares.defvjp(lambda w, tap: (w, None), _with_squares_backward)


def embedding(ids: Any, words_VxD: Weights, dtype: Any) -> Any:
    """Rows [..., D] of the words [V, D], cast to dtype."""
    if not isinstance(words_VxD, Tracked):
        return words_VxD[ids].astype(dtype)
    shape = (*ids.shape, words_VxD.shape[1])
    if words_VxD.uses is not None:
        taps = {
            "ids": jax.ShapeDtypeStruct((ids.size,), jnp.float32),
            "g": jax.ShapeDtypeStruct((ids.size, shape[-1]), dtype),
        }
        return record(words_VxD, Use(EMBEDDING, words_VxD.shape, taps), jax.ShapeDtypeStruct(shape, dtype), ids)
    if EMBEDDING not in words_VxD.taps:
        return words_VxD.open()[ids].astype(dtype)
    # One id for each word, so that rules see which ids meet.
    count, ids = words_VxD.shape[0], ids.reshape(-1)
    ids = jnp.clip(jnp.where(ids < 0, ids + count, ids), 0, count - 1)
    return _tracked_rows(ids, words_VxD.open(), words_VxD.taps[EMBEDDING]).reshape(shape)


def add_rows(table_VxD: jax.Array, ids_N: jax.Array, rows_NxD: jax.Array, platform: str | None = None) -> Any:
    """The table with each row added to that of its id; ids may occur several times.

    On a GPU the rows of one id are added up by a product first, and each sum takes the place of the old row: jaxlib
    0.10.2 to 0.11.0 compiles the addition of float32 rows to a loop that waits for others at every number
    (openxla/xla#46225). Which way is faster where, experiments.benchmarks.row_sums measures; on a GPU nobody has yet.

    Args:
      platform: that the program is compiled for; by default that of jax's first device.
    """
    if (platform or jax.default_backend()) != "gpu" or len(ids_N) > _MOST_ROWS_BY_PRODUCT:
        return table_VxD.at[ids_N].add(rows_NxD.astype(table_VxD.dtype))
    same_NxN = (ids_N[:, None] == ids_N[None, :]).astype(jnp.float32)
    sums_NxD = jnp.matmul(same_NxN, rows_NxD.astype(jnp.float32), precision=PRECISION)
    # Rows of one id take the same place with the same numbers, in whatever order.
    return table_VxD.at[ids_N].set((table_VxD[ids_N].astype(jnp.float32) + sums_NxD).astype(table_VxD.dtype))


@jax.custom_vjp
def _tracked_rows(ids_N: jax.Array, words_VxD: jax.Array, taps: Any) -> Any:
    return words_VxD[ids_N].astype(taps["g"].dtype)


def _tracked_rows_forward(ids_N: jax.Array, words_VxD: jax.Array, taps: Any) -> tuple[Any, Any]:
    return _tracked_rows(ids_N, words_VxD, taps), ids_N


def _tracked_rows_backward(ids_N: jax.Array, g_NxD: jax.Array) -> tuple[Any, Any, Any]:
    # A cotangent is of floating type; float32 holds every id exactly.
    return None, None, {"ids": ids_N.astype(jnp.float32), "g": g_NxD}


_tracked_rows.defvjp(_tracked_rows_forward, _tracked_rows_backward)


def head(core: Any, hidden_NxD: jax.Array, words_VxD: Weights, targets_N: jax.Array) -> Any:
    """Losses [N] in float32 of a head that multiplies hidden states by words [V, D], some words at a time.

    Args:
      core: hashable, with
        chunk: C, how many words at a time;
        forward(hidden, words, targets) -> (losses [N], residuals);
        backward(residuals, d_losses [N], use) -> (gradient [N, D] by the hidden states, what `use` made of delta [N,
        C], the gradient
          by one chunk's logits in the type of the hidden states, stacked over the K = ceil(V / C) chunks).
    """
    if isinstance(words_VxD, Tracked) and words_VxD.uses is None and not words_VxD.keep:
        words_VxD = words_VxD.open()
    if not isinstance(words_VxD, Tracked):
        return _head(core, hidden_NxD, words_VxD, targets_N)
    if words_VxD.uses is not None:
        chunks = -(-words_VxD.shape[0] // core.chunk)
        delta = jax.ShapeDtypeStruct((chunks, hidden_NxD.shape[0], core.chunk), hidden_NxD.dtype)
        taps = {"h": jax.ShapeDtypeStruct(hidden_NxD.shape, hidden_NxD.dtype), "delta": delta}
        return record(
            words_VxD, Use(HEAD, words_VxD.shape, taps), jax.ShapeDtypeStruct(targets_N.shape, jnp.float32), hidden_NxD
        )
    return _tracked_head(core, hidden_NxD, words_VxD.open(), targets_N, words_VxD.taps[HEAD])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(core: Any, hidden_NxD: jax.Array, words_VxD: jax.Array, targets_N: jax.Array) -> Any:
    return core.forward(hidden_NxD, words_VxD, targets_N)[0]


def _head_forward(core: Any, hidden_NxD: jax.Array, words_VxD: jax.Array, targets_N: jax.Array) -> tuple[Any, Any]:
    losses, residuals = core.forward(hidden_NxD, words_VxD, targets_N)
    return losses, (hidden_NxD, words_VxD, residuals)


def _head_backward(core: Any, residuals: Any, d_losses_N: jax.Array) -> tuple[Any, Any, Any]:
    hidden_NxD, words_VxD, residuals = residuals
    product = functools.partial(jnp.einsum, "nc,nd->cd", precision=PRECISION, preferred_element_type=jnp.float32)

    def use(delta_NxC: jax.Array) -> Any:
        return product(delta_NxC, hidden_NxD).astype(words_VxD.dtype)

    d_hidden, d_words_KxCxD = core.backward(residuals, d_losses_N, use)
    return d_hidden, d_words_KxCxD.reshape(-1, words_VxD.shape[1])[: words_VxD.shape[0]], None


_head.defvjp(_head_forward, _head_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tracked_head(core: Any, hidden_NxD: jax.Array, words_VxD: jax.Array, targets_N: jax.Array, taps: Any) -> Any:
    return core.forward(hidden_NxD, words_VxD, targets_N)[0]


def _tracked_head_forward(
    core: Any, hidden_NxD: jax.Array, words_VxD: jax.Array, targets_N: jax.Array, taps: Any
) -> tuple[Any, Any]:
    losses, residuals = core.forward(hidden_NxD, words_VxD, targets_N)
    return losses, (hidden_NxD, residuals)


def _tracked_head_backward(core: Any, residuals: Any, d_losses_N: jax.Array) -> tuple[Any, Any, Any, Any]:
    hidden_NxD, residuals = residuals
    d_hidden, delta_KxNxC = core.backward(residuals, d_losses_N, lambda delta_NxC: delta_NxC)
    return d_hidden, None, None, {"h": hidden_NxD, "delta": delta_KxNxC}


_tracked_head.defvjp(_tracked_head_forward, _tracked_head_backward)
