"""Sums of clipped gradients of units that may have several rows: one row after the other, so that a unit costs as many
rows as it has, and not as many as it may have.

The gradient of a unit is the mean of its rows' gradients. It is added up in one array, and clipped where the unit's
last row ends. The batch has places for all rows that its units may have, k times its cap on units; those without a row
are never looked at. That is also the smallest cap on rows that can be planned: where all units have k rows, a smaller
one is reached more often than the cap on units, and where it is reached one unit's rows decide whether several others
take part.

Formal guarantee: as that of dpgemma.privacy.clipping: what one unit adds has norm at most the sensitivity, rounding
included, because the norm is that of the array which is scaled. Tested by
tests/training/units_test.py::test_a_unit_of_several_rows_contributes_its_clipped_mean_gradient and
tests/training/users_test.py::test_without_a_user_the_sum_differs_by_the_clip_norm_at_most.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.data.batch import Batch, Unit
from dpgemma.privacy import norms

Loss = Callable[[Any, Unit], jax.Array]


def scaled_sum(
    loss: Loss,
    params: Any,
    batch: Batch,
    factor: Callable[[Any, float], Any],
    placed: Callable[[Any], Any],
    total: Any,
    together: tuple[str, ...],
) -> tuple[Any, jax.Array, jax.Array]:
    """Adds the scaled gradient of every unit to `total`.

    Args:
      loss: of one unit: the mean over its rows of a loss of one row, as dpgemma.objectives.protocol asks for.
      factor: factor(norm, margin) is what a gradient with this norm is multiplied by.
      placed: scaled numbers as they are added.
      together: mesh axes whose devices go through the loop equally often.

    Returns:
      (total, norms [B], losses [B]), zero for slots without a unit.
    """
    slots, places = batch.real.shape
    flat = jax.tree.map(lambda x: x.reshape(slots * places, *x.shape[2:]), batch.rows)
    is_row = batch.real.reshape(-1)
    order = jnp.argsort(~is_row, stable=True)  # rows in front, those of a unit adjacent
    rows_of_unit = batch.real.sum(axis=1)
    count = used = is_row.sum()
    for axis_name in together:
        used = jax.lax.pmax(used, axis_name)
    margin = norms.margin(params)

    def add_unit(total: Any, gradient: Any) -> tuple[Any, jax.Array]:
        # Without the barrier a compiler may compute the gradient twice, for the norm and for the product, and round it
        # differently.
        gradient = jax.lax.optimization_barrier(gradient)
        length = norms.l2_norm(gradient)
        scale, finite = factor(length, margin), jnp.isfinite(length)

        def add(sum_: Any, leaf: Any) -> Any:
            scaled = placed(leaf * scale)
            return sum_ + jnp.where(finite, scaled, jnp.zeros_like(scaled))

        return jax.tree.map(add, total, gradient), length

    def add_row(i: Any, carry: Any) -> Any:
        total, gradient, value, lengths, losses = carry
        place = order[jnp.minimum(i, slots * places - 1)]
        slot, is_here = place // places, i < count
        after = order[jnp.minimum(i + 1, slots * places - 1)] // places
        ends = is_here & ((i + 1 >= count) | (after != slot))
        one = Unit(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1), flat), jnp.ones(1, bool))
        loss_of_row, of_row = jax.value_and_grad(loss)(params, one)
        share = 1.0 / jnp.maximum(rows_of_unit[slot], 1)
        gradient = jax.tree.map(
            lambda mine, leaf: jnp.where(is_here, mine + leaf.astype(jnp.float32) * share, mine), gradient, of_row
        )
        value = jnp.where(is_here, value + loss_of_row.astype(jnp.float32) * share, value)
        if together:  # inside of a branch, devices could wait for those that do not take it
            added, length = add_unit(total, gradient)
            total = jax.tree.map(lambda new, old: jnp.where(ends, new, old), added, total)
        else:
            total, length = jax.lax.cond(ends, add_unit, lambda total, _: (total, jnp.float32(0)), total, gradient)
        lengths = jnp.where(ends, lengths.at[slot].set(length), lengths)
        losses = jnp.where(ends, losses.at[slot].set(value), losses)
        gradient = jax.tree.map(lambda leaf: jnp.where(ends, jnp.zeros_like(leaf), leaf), gradient)
        return total, gradient, jnp.where(ends, 0.0, value), lengths, losses

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    start = (total, nothing, jnp.float32(0), jnp.zeros(slots), jnp.zeros(slots))
    total, _, _, lengths, losses = jax.lax.fori_loop(0, used, add_row, start)
    return total, lengths, losses
