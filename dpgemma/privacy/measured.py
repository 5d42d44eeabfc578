"""The gradient of one example together with its norm, which is taken piece by piece where the pieces are made."""

import jax
import jax.numpy as jnp

from dpgemma.privacy import norms, tracking
from dpgemma.privacy.ghost import Parameter
from dpgemma.privacy.operations import EMBEDDING, LINEAR, SQUARE, VECTOR


def gradient(loss, params, example):
    """(loss, gradient tree, its L2 norm) of one example.

    What an accelerator would otherwise read once more, it has at hand while the gradient of each layer is made. A loss that uses
    parameters in ways that privacy.operations does not know gets the same, one reading later.
    """
    try:
        uses = tracking.audit(loss, params, example)
    except tracking.UntrackedUse:
        return plain_gradient(loss, params, example)
    leaves, structure = jax.tree.flatten(params)
    names = tracking.leaf_names(params)
    parameters = [Parameter.of(leaf, uses.get(name, {})) for leaf, name in zip(leaves, names, strict=True)]

    def of_boxes(params, taps):
        return loss(tracking.boxes(params, taps, keep=False), example)

    value, (gradient, taps) = jax.value_and_grad(of_boxes, (0, 1))(params, [_taps(p) for p in parameters])
    squares, gradients = [], []
    for leaf, tap, parameter in zip(jax.tree.leaves(gradient), taps, parameters, strict=True):
        rows = tap.get(EMBEDDING)
        if rows:
            leaf = leaf.at[rows["ids"].astype(jnp.int32)].add(rows["g"].astype(leaf.dtype))
        if SQUARE in tap:
            squares.append(tap[SQUARE].reshape(-1))
        else:
            leaf = jax.lax.optimization_barrier(leaf)
            squares.append(norms.square_sum([leaf]).reshape(1))
        gradients.append(leaf)
    return value, structure.unflatten(gradients), jnp.sqrt(norms.total(squares))


def _taps(parameter: Parameter) -> dict:
    if EMBEDDING in parameter.uses:
        return {EMBEDDING: {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in parameter.uses[EMBEDDING].taps.items()}}
    return {SQUARE: jnp.zeros(parameter.shape[: parameter.layers])} if parameter.uses.keys() & {VECTOR, LINEAR} else {}


def plain_gradient(loss, params, example):
    """The same, by any loss."""
    value, gradient = jax.value_and_grad(loss)(params, example)
    # Without the barrier a compiler may compute the gradient twice, for the norm and for the product, and round it differently.
    gradient = jax.lax.optimization_barrier(gradient)
    return value, gradient, norms.l2_norm(gradient)
