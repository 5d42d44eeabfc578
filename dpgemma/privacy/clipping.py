"""Sums of per-example gradients, each clipped to an L2 norm.

Formal guarantee: for any two batches that differ in one unit, present or absent, whatever its content (NaN, inf and overflow
included), the two exact sums of what `clipped_sum` adds differ by at most `clip_norm` in L2; the contribution of a single unit,
as the float32 array that is released, has L2 norm at most `clip_norm`, in any compute type. Padding contributes exact zeros.
Adding the contributions rounds like any float32 sum.
Tested by tests/privacy/clipping_test.py::test_pitfall_2_neighbour_difference_is_bounded and
::test_pitfall_12_released_norm_never_exceeds_clip_norm.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

STRATEGIES = ("example_scan", "vmap")

# Squares of float32 numbers below 1e-19 vanish. With a clip norm of at least this, what vanishes is below one part in 1e12 of it.
SMALLEST_CLIP_NORM = 1e-6

_RADIX = 8
_UNIT_ROUNDOFF = 2.0**-24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrivateStats:
    """Raw per-example values [B], zero for padding. The guarantee does not cover them: they may go to private/ only."""

    norms: jax.Array
    losses: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A float32 sum of clipped gradients that carries its own L2 sensitivity. The only thing that noise may be added to."""

    total: Any
    stats: PrivateStats
    sensitivity: float = dataclasses.field(metadata={"static": True})


def _fold(x):
    """Sums a vector eight to one: ceil(n / 8) sums of eight terms."""
    x = jnp.pad(x, (0, -x.size % _RADIX))
    return x.reshape(_RADIX, -1).sum(axis=0)


def _fold_levels(tree) -> int:
    """How many folds `l2_norm` makes: one per leaf, then as many as the joined partial sums need."""
    joined = sum(math.ceil(leaf.size / _RADIX) for leaf in jax.tree.leaves(tree))
    levels = 1
    while joined > 1:
        joined, levels = math.ceil(joined / _RADIX), levels + 1
    return levels


def l2_norm(tree) -> jax.Array:
    """The L2 norm over all leaves of a float32 tree; inf or NaN where any square is.

    The order of additions is fixed, so the rounding error is known: an ordinary reduction may add a million numbers in sequence,
    and its float32 result can then be too small by more than any constant margin.
    """
    partial = jnp.concatenate([_fold(jnp.square(leaf.astype(jnp.float32).reshape(-1))) for leaf in jax.tree.leaves(tree)])
    while partial.size > 1:
        partial = _fold(partial)
    return jnp.sqrt(partial[0])


def clip_margin(tree) -> float:
    """By how much the clip factor is lowered, relatively, so that rounding can never carry a clipped gradient above the norm.

    With u = 2^-24 and L folds, the computed sum of squares is at least (1 - (1 + 7 L) u) times the true one (each fold adds seven
    times), so the norm is low by at most half of that; square root, division, the rounded bound and the final product add one u
    each on hardware that rounds correctly and a few on hardware that does not.
    """
    return (4 * _fold_levels(tree) + 16) * _UNIT_ROUNDOFF


def clip(gradient, keep, clip_norm: float):
    """Scales one gradient tree to at most `clip_norm`; all zeros if its norm is not finite or `keep` is false.

    Returns:
      The clipped float32 tree and the norm before clipping, which may be inf or NaN.
    """
    # Without the barrier a compiler may compute the gradient twice, for the norm and for the product, and round it differently.
    gradient = jax.lax.optimization_barrier(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient))
    norm = l2_norm(gradient)
    factor = jnp.minimum(1.0, clip_norm * (1 - clip_margin(gradient)) / norm)
    keep = keep & jnp.isfinite(norm)
    # A select, not a product with zero: 0 * inf is NaN.
    return jax.tree.map(lambda leaf: jnp.where(keep, leaf * factor, 0.0), gradient), norm


def clipped_sum(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    mask: jax.Array,
    clip_norm: float,
    *,
    strategy: str = "example_scan",
    microbatch_size: int = 1,
) -> ClippedSum:
    """Sum over the examples with mask set of clip(grad(loss)(params, example)), in float32.

    Trailing padding is not computed at all: the loop ends after the last microbatch that holds an example.

    Args:
      loss: scalar loss of one example; must not depend on any other example.
      params: tree of parameters; exactly these are differentiated.
      batch: tree of arrays with a leading axis of B examples.
      mask: bool [B]; false marks padding, whose content is ignored.
      clip_norm: L2 bound per example; inf turns clipping off (non-finite gradients are dropped all the same).
      strategy: "example_scan" takes one plain gradient at a time; "vmap" takes `microbatch_size` of them at once.

    Returns:
      ClippedSum, with per-example losses and norms for private use.

    Raises:
      ValueError: unknown strategy, a clip norm that is not at least SMALLEST_CLIP_NORM, or B not a multiple of microbatch_size.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"clipping must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not clip_norm >= SMALLEST_CLIP_NORM:
        raise ValueError(f"clip_norm must be at least {SMALLEST_CLIP_NORM:g}, got {clip_norm:g}")
    size = 1 if strategy == "example_scan" else microbatch_size
    batch_size = mask.shape[0]
    if batch_size % size:
        raise ValueError(f"a batch of {batch_size} slots does not divide into microbatches of {size}")

    def clipped_gradient(example, keep):
        value, gradient = jax.value_and_grad(loss)(params, example)
        clipped, norm = clip(gradient, keep, clip_norm)
        return clipped, jnp.where(keep, norm, 0.0), jnp.where(keep, value.astype(jnp.float32), 0.0)

    def microbatch_sum(examples, keep):
        if size == 1:
            clipped, norm, value = clipped_gradient(jax.tree.map(lambda x: x[0], examples), keep[0])
            return clipped, norm[None], value[None]
        clipped, norms, values = jax.vmap(clipped_gradient)(examples, keep)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), clipped), norms, values

    def add_microbatch(i, carry):
        total, norms, losses = carry
        window = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size)
        clipped, norm, value = microbatch_sum(jax.tree.map(window, batch), window(mask))
        write = lambda xs, x: jax.lax.dynamic_update_slice_in_dim(xs, x, i * size, 0)
        return jax.tree.map(jnp.add, total, clipped), write(norms, norm), write(losses, value)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    used = jnp.max(jnp.where(mask, jnp.arange(batch_size) // size + 1, 0), initial=0)
    start = (zeros, jnp.zeros(batch_size), jnp.zeros(batch_size))
    total, norms, losses = jax.lax.fori_loop(0, used, add_microbatch, start)
    return ClippedSum(total, PrivateStats(norms, losses), sensitivity=float(clip_norm))


def sum_over_devices(clipped: ClippedSum, axis_name: str) -> ClippedSum:
    """Adds the sums of devices that hold disjoint units (inside shard_map). One unit lies on one device: same sensitivity."""
    return dataclasses.replace(clipped, total=jax.lax.psum(clipped.total, axis_name))
