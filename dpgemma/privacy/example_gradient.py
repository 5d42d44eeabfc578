"""The gradient of one example together with its norm, which is taken piece by piece where the pieces are made.

Formal guarantee: the norm is that of the very arrays that are returned, whatever their type, up to the rounding that
norms.margin bounds. Tested by
tests/privacy/released_norm_test.py::test_pitfall_12_released_norm_never_exceeds_clip_norm and
tests/privacy/audit_test.py::test_pitfall_2_a_scan_measures_what_it_cannot_track_on_the_whole_gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.privacy import norms, operations, tracking
from dpgemma.privacy import uses as audit
from dpgemma.privacy.book_keeping import Parameter
from dpgemma.privacy.operations import EMBEDDING, LINEAR, SQUARES, VECTOR

# Rules whose parameters have their gradient measured where it is made.
_MEASURED = (VECTOR, LINEAR)


def gradient(loss: Any, params: Any, example: Any) -> Any:
    """(loss, gradient tree, its L2 norm) of one example.

    The norm is taken while the gradient of each layer is made, which saves an accelerator one pass over the gradient. A
    loss that uses parameters in ways that privacy.operations does not know falls back to `plain_gradient`.
    """
    try:
        uses = audit.uses_of(loss, params, example)
    except tracking.UntrackedUse:
        return plain_gradient(loss, params, example)
    leaves, structure = jax.tree.flatten(params)
    names = tracking.leaf_names(params)
    parameters = [Parameter.of(leaf, uses.get(name, {})) for leaf, name in zip(leaves, names, strict=True)]

    def of_boxes(params: Any, taps: Any) -> Any:
        return loss(tracking.boxes(params, taps, keep=False), example)

    value, (gradient, taps) = jax.value_and_grad(of_boxes, (0, 1))(params, [_taps(p) for p in parameters])
    squares, gradients = [], []
    for leaf, tap in zip(jax.tree.leaves(gradient), taps, strict=True):
        rows = tap.get(EMBEDDING)
        if rows:
            leaf = operations.add_rows(leaf, rows["ids"].astype(jnp.int32), rows["g"])
        if SQUARES in tap:
            squares.append(norms.column_sums(tap[SQUARES]))
        else:
            leaf = jax.lax.optimization_barrier(leaf)
            squares.append(norms.column_squares(leaf))
        gradients.append(leaf)
    return value, jax.tree.unflatten(structure, gradients), jnp.sqrt(norms.total(squares))


def _taps(parameter: Parameter) -> dict[str, Any]:
    if EMBEDDING in parameter.uses:
        return {
            EMBEDDING: {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in parameter.uses[EMBEDDING].taps.items()}
        }
    columns = [
        math.prod(use.shape[use.inputs :] if use.inputs else use.shape[-1:])
        for use in parameter.uses.values()
        if use.rule in _MEASURED
    ]
    return {SQUARES: jnp.zeros((*parameter.shape[: parameter.layers], columns[0]))} if columns else {}


def plain_gradient(loss: Any, params: Any, example: Any) -> tuple[Any, Any, Any]:
    """(loss, gradient tree, its L2 norm) of one unit, for any loss: the norm is taken of the finished gradient."""
    value, gradient = jax.value_and_grad(loss)(params, example)
    # Without the barrier a compiler may compute the gradient twice, for the norm and for the product, and round it
    # differently.
    gradient = jax.lax.optimization_barrier(gradient)
    return value, gradient, norms.l2_norm(gradient)
