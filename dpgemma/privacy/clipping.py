"""Sums of per-example gradients, each scaled to a bounded L2 norm.

Formal guarantee: for any two batches that differ in one unit, present or absent, whatever its content (NaN, inf and
overflow included), the two exact sums of what `clipped_sum` adds differ by at most `sensitivity` in L2; the
contribution of a single unit has norm at most `sensitivity` in any compute type, rounding included (for strategies that
never hold one unit's gradient: as ghost_norms states it). Padding contributes exact zeros. Adding the contributions
rounds like any float32 sum. Tested by tests/privacy/clipping_test.py::test_pitfall_2_neighbour_difference_is_bounded
and ::test_pitfall_12_released_norm_never_exceeds_clip_norm.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.privacy import book_keeping as ghost
from dpgemma.privacy import example_gradient as measured
from dpgemma.privacy import norms

# How gradients are computed: one example at a time; from the operands of one kept backward pass; the same, every
# operation of every layer bounded by itself; all at once, as the definition says.
EXAMPLE_SCAN, GHOST, PER_LAYER, VMAP = "example_scan", "ghost", "per_layer", "vmap"
STRATEGIES = (EXAMPLE_SCAN, GHOST, PER_LAYER, VMAP)

# How a gradient is scaled: to norm C at most; the same, divided by C; to norm 1 nearly, whatever it was.
CLIP, NORMALISE, AUTOMATIC = "clip", "normalise", "automatic"
SCALINGS = (CLIP, NORMALISE, AUTOMATIC)
# Bu et al. 2023, "Automatic clipping" (arXiv 2206.07136), section 4: what keeps small gradients small.
STABILISER = 0.01

# Squares of float32 numbers below 1e-19 vanish. With a clip norm of at least this, what vanishes is below one part in
# 1e12 of it.
SMALLEST_CLIP_NORM = 1e-6

_FEW = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrivateStats:
    """Raw per-example values [B], zero for padding. The guarantee does not cover them: they may go to private/ only."""

    norms: jax.Array
    losses: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A float32 sum of scaled gradients that carries its own L2 sensitivity. The only thing that noise may be added to.

    Attributes:
      count: where it was asked for, the sum over the units of +1/2 for a norm of at most C and -1/2 for a larger one;
        nothing for a norm of zero, as an empty unit has, and for one that is not finite. Sensitivity 1/2 whether a unit
        goes or an empty one replaces it.
    """

    total: Any
    stats: PrivateStats
    sensitivity: float = dataclasses.field(metadata={"static": True})
    count: jax.Array | None = None


def sensitivity(scaling: str, clip_norm) -> float:
    """The most that one unit changes a sum of gradients scaled in this way."""
    return float(clip_norm) if scaling == CLIP else 1.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The factor of a gradient, from a bound on its norm.

    Attributes:
      kind: one of SCALINGS.
      clip_norm: C; no number of its own under AUTOMATIC. May be traced except under CLIP, whose sensitivity it is.
      stabiliser: gamma of AUTOMATIC.
    """

    kind: str
    clip_norm: Any
    stabiliser: float = STABILISER

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.kind!r}")
        if not self.stabiliser > 0:
            raise ValueError(f"the stabiliser of automatic clipping must be positive, got {self.stabiliser:g}")
        if isinstance(self.clip_norm, jax.core.Tracer):
            if self.kind == CLIP:
                raise ValueError("a clip norm that is computed has no known sensitivity: use scaling=normalise")
        elif not self.clip_norm >= SMALLEST_CLIP_NORM:
            raise ValueError(f"clip_norm must be at least {SMALLEST_CLIP_NORM:g}, got {self.clip_norm:g}")
        elif self.kind != CLIP and not self.clip_norm < float("inf"):
            raise ValueError(f"scaling {self.kind} needs a finite clip_norm")

    @property
    def sensitivity(self) -> float:
        return sensitivity(self.kind, self.clip_norm)

    def factor(self, norm, margin: float, share=1.0):
        """What the gradient is multiplied by, so that its norm is at most `share` of the sensitivity.

        Args:
          norm: a bound on the norm of each gradient, up to the relative rounding error `margin`.
        """
        if self.kind == AUTOMATIC:
            return share * (1 - margin) / (norm + self.stabiliser)
        factor = jnp.minimum(1.0, share * self.clip_norm * (1 - margin) / norm)
        return factor if self.kind == CLIP else factor / self.clip_norm * (1 - 4 * norms.UNIT_ROUNDOFF)


def _held(gradient_of_example):
    """One microbatch by gradients that are held, each with its norm."""

    def microbatch(loss, params, examples, keep, scaling: Scaling):
        def of_example(example):
            return gradient_of_example(loss, params, example)

        if keep.shape == (1,):
            one = of_example(jax.tree.map(lambda x: x[0], examples))
            losses, gradients, lengths = jax.tree.map(lambda x: x[None], one)
        else:
            losses, gradients, lengths = jax.vmap(of_example)(examples)
        factors, keep = scaling.factor(lengths, norms.margin(params)), keep & jnp.isfinite(lengths)

        def weighted(leaf):
            # A select, not a product with zero: 0 * inf is NaN.
            def term(i):
                return jnp.where(keep[i], leaf[i].astype(jnp.float32) * factors[i], 0.0)

            # Few terms are added one by one, which fuses into a single pass over the total.
            return (
                sum(map(term, range(len(leaf))))
                if len(leaf) <= _FEW
                else jax.vmap(term)(jnp.arange(len(leaf))).sum(axis=0)
            )

        return jax.tree.map(weighted, gradients), lengths, losses

    return microbatch


def _ghost(loss, params, examples, keep, scaling: Scaling, gathered=None):
    """One microbatch from the operands of one backward pass."""
    kept = ghost.backward(loss, params, examples, gathered)
    lengths = kept.norms()
    factors = scaling.factor(lengths.bound, norms.margin(params))
    return kept.weighted_sums(factors, keep & jnp.isfinite(lengths.bound)), lengths.norm, kept.losses


def _per_layer(loss, params, examples, keep, scaling: Scaling, thresholds, gathered=None):
    """The same, every group by itself."""
    kept = ghost.backward(loss, params, examples, gathered)
    shares = kept.shares(thresholds)
    groups = kept.group_norms()
    # An example that is not finite in one group is dropped in all.
    finite = [jnp.isfinite(n.bound).all(axis=0) for rules in groups for n in rules.values()]
    factors = [
        {rule: scaling.factor(n.bound, norms.margin(params), share[rule][:, None]) for rule, n in rules.items()}
        for rules, share in zip(groups, shares, strict=True)
    ]
    return kept.weighted_sums(factors, functools.reduce(operator.and_, finite, keep)), kept.norms().norm, kept.losses


def clipped_sum(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    mask: jax.Array,
    clip_norm: float,
    *,
    strategy: str = EXAMPLE_SCAN,
    microbatch_size: int = 1,
    scaling: str = CLIP,
    stabiliser: float = STABILISER,
    thresholds: str | Mapping[str, Any] = ghost.UNIFORM,
    counted: bool = False,
    gathered: list | None = None,
) -> ClippedSum:
    """Sum over the examples with mask set of factor * grad(loss)(params, example), in float32.

    Trailing padding is not computed at all: the loop ends after the last microbatch that holds an example.

    Args:
      loss: scalar loss of one example (a unit of several rows is one example: the norm is that of its gradient); must
        not depend on any other example.
      params: tree of parameters; exactly these are differentiated.
      batch: tree of arrays with a leading axis of B examples.
      mask: bool [B]; false marks padding, whose content is ignored.
      clip_norm: C, the L2 bound per example; inf turns clipping off (non-finite gradients are dropped all the same).
      strategy: "example_scan" holds the gradients of a small microbatch; "vmap" does so as the definition says, for
        tests; "ghost" never holds one; "per_layer" bounds every operation of every layer by itself, all bounds together
        making C.
      microbatch_size: examples at a time.
      scaling: "clip" to C, "normalise" (the same divided by C: sensitivity 1) or "automatic" (divided by norm +
        stabiliser: the same).
      thresholds: of "per_layer": "uniform", by "dimension" (in proportion to the square root of a group's size), or for
        the name of every parameter an array of its layers' shares, which are scaled to the norm that they have
        together.
      counted: whether to count the units whose norm is at most C, for `adaptive`.
      gathered: inside shard_map, for every leaf of params the tracking.Gathered axis of which this device holds a
        shard, or None; "ghost" and "per_layer" only. The sums of such leaves are shards of the sum over all devices;
        those of the others, of this one.

    Returns:
      ClippedSum, with per-example losses and norms for private use.

    Raises:
      ValueError: unknown strategy or scaling, a clip norm that is not at least SMALLEST_CLIP_NORM, or B not a multiple
        of microbatch_size.
      tracking.UntrackedUse: "ghost" or "per_layer" where a parameter is used by anything but privacy.operations.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"clipping must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if gathered is not None and strategy not in (GHOST, PER_LAYER):
        raise ValueError(
            f"{strategy} holds whole gradients, which sharded parameters are meant to avoid: use {GHOST} or {PER_LAYER}"
        )
    rule = Scaling(scaling, clip_norm, stabiliser)
    size, batch_size = microbatch_size, mask.shape[0]
    if batch_size % size:
        raise ValueError(f"a batch of {batch_size} slots does not divide into microbatches of {size}")
    method = {
        EXAMPLE_SCAN: _held(measured.gradient),
        GHOST: functools.partial(_ghost, gathered=gathered),
        PER_LAYER: functools.partial(_per_layer, thresholds=thresholds, gathered=gathered),
        VMAP: _held(measured.plain_gradient),
    }[strategy]

    def add_microbatch(i, carry):
        total, lengths, losses = carry

        def window(x):
            return jax.lax.dynamic_slice_in_dim(x, i * size, size)

        keep = window(mask)
        one, length, value = method(loss, params, jax.tree.map(window, batch), keep, rule)

        def write(xs, x):
            return jax.lax.dynamic_update_slice_in_dim(xs, jnp.where(keep, x.astype(jnp.float32), 0.0), i * size, 0)

        return jax.tree.map(jnp.add, total, one), write(lengths, length), write(losses, value)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    start = (zeros, jnp.zeros(batch_size), jnp.zeros(batch_size))
    if size == batch_size:  # no loop, whose windows a compiler could not keep sharded
        total, lengths, losses = add_microbatch(0, start)
    else:
        used = jnp.max(jnp.where(mask, jnp.arange(batch_size) // size + 1, 0), initial=0)
        for axis_name in {shard.axis_name for shard in gathered or [] if shard}:
            used = jax.lax.pmax(used, axis_name)  # devices that gather from each other go through the loop together
        total, lengths, losses = jax.lax.fori_loop(0, used, add_microbatch, start)
    count = None
    if counted:
        halves = jnp.where(lengths <= clip_norm, 0.5, -0.5)
        # A unit of nothing counts as an absent one: as a half, its place taken by a unit's content would move the count
        # by a whole.
        count = jnp.where(mask & (lengths > 0) & jnp.isfinite(lengths), halves, 0.0).sum()
    return ClippedSum(total, PrivateStats(lengths, losses), sensitivity=rule.sensitivity, count=count)


def sum_over_devices(clipped: ClippedSum, axis_name: str, gathered: list | None = None) -> ClippedSum:
    """Adds the sums of devices that hold disjoint units (inside shard_map). One unit lies on one device: same
    sensitivity.

    Args:
      gathered: as clipped_sum was given it; what is a shard of such a sum already stays as it is.
    """
    leaves, structure = jax.tree.flatten(clipped.total)
    shards = gathered or [None] * len(leaves)
    summed = [shard is not None and shard.axis_name == axis_name for shard in shards]
    sums = [leaf if done else jax.lax.psum(leaf, axis_name) for leaf, done in zip(leaves, summed, strict=True)]
    return dataclasses.replace(clipped, total=structure.unflatten(sums), count=jax.lax.psum(clipped.count, axis_name))
