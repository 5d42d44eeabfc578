"""Sums of per-unit gradients, each scaled to a bounded L2 norm.

Formal guarantee: for any two batches that differ in one unit, present or absent, whatever its content (NaN, inf and
overflow included), the two exact sums of what `clipped_sum` adds differ by at most `sensitivity` in L2; the
contribution of a single unit has norm at most `sensitivity` in any compute type, rounding included (for strategies that
never hold one unit's gradient: as norm_rules states it). A unit of several rows is one unit: its gradient is that of
its loss, and bounded as a whole. Padding contributes exact zeros.

On a grid (`steps` given) what is added are whole numbers of steps: each number of a unit's scaled gradient is cut off
towards zero, which lengthens no vector, and sums are taken modulo 2^32, which no order, microbatch or device changes.
So the sums that are really computed, in steps and modulo 2^32, differ by a vector of whole numbers of norm at most
`steps`, for every batch size. Without a grid, adding rounds like any float32 sum, and 16384 units can move it by 4
times the sensitivity.
Tested by tests/privacy/clipping_test.py::test_pitfall_2_neighbour_difference_is_bounded,
tests/privacy/released_norm_test.py::test_pitfall_12_released_norm_never_exceeds_clip_norm,
tests/privacy/exact_sum_test.py::test_an_adversarial_batch_moves_the_sum_by_the_sensitivity_at_most and
tests/training/units_test.py::test_a_unit_of_several_rows_contributes_its_clipped_mean_gradient.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from accounting.mechanism.clip import AUTOMATIC, CLIP, Clip
from dpgemma.choices import EXAMPLE_SCAN, GHOST, PER_LAYER, STRATEGIES, UNIFORM, VMAP
from dpgemma.data.batch import Batch, Unit
from dpgemma.privacy import book_keeping, example_gradient, norms, row_by_row

# Bu et al. 2023, "Automatic clipping" (arXiv 2206.07136), section 4: what keeps small gradients small.
STABILISER = 0.01

# Squares of float32 numbers below 1e-19 vanish. With a clip norm of at least this, what vanishes is below one part in
# 1e12 of it.
SMALLEST_CLIP_NORM = 1e-6

_FEW = 8

Loss = Callable[[Any, Unit], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrivateStats:
    """Raw values, zero for padding. The guarantee does not cover them: they may go to private/ only.

    Attributes:
      norms, losses: [B], of every unit.
      observed: [m], where gradient canaries are measured: what the noised sum holds at their places, less the clipped
        gradients of all other units, in units of the sensitivity. Beside the release it tells the noise.
    """

    norms: jax.Array
    losses: jax.Array
    observed: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum of scaled gradients that carries its own L2 sensitivity. The only thing that noise may be added to.

    >>> from dpgemma.privacy.noise import add_gaussian_noise
    >>> add_gaussian_noise(jnp.zeros(3), 1.0, None)
    Traceback (most recent call last):
      ...
    TypeError: noise goes on a ClippedSum, got ArrayImpl

    Attributes:
      total: tree of sums, shaped like the parameters: float32; on a grid int32, in steps and modulo 2^32.
      stats: raw values of every unit.
      sensitivity: the most that one unit changes `total`, in L2.
      count: where a clip norm adapts, the sum over the units of +1/2 for a norm of at most C and -1/2 for a larger one.
        A unit counts nothing if its norm is zero, as that of an empty unit is, or not finite. One unit moves the count
        by at most 1/2, whether it goes or an empty one takes its place. On a grid int32, in halves: +1 or -1 each.
      steps: on a grid, the sensitivity of `total` in steps, not rounded; else None.
    """

    total: Any
    stats: PrivateStats
    sensitivity: float = dataclasses.field(metadata={"static": True})
    count: jax.Array | None = None
    steps: Any = None


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How clipped gradients are computed; what they add up to does not depend on it, but for per_layer.

    >>> Strategy("ghost", microbatch_size=4).name
    'ghost'

    Attributes:
      name: one of dpgemma.choices.STRATEGIES.
      microbatch_size: units at a time, on each device.
      thresholds: how per_layer divides the norm: "uniform", by "dimension" (in proportion to the square root of a
        group's size), or for the name of every parameter an array of its layers' shares, which are scaled to the norm
        that they have together.
      platform: for which ghost and per_layer choose the cheaper way to a norm; by default that of jax's first device.
    """

    name: str = EXAMPLE_SCAN
    microbatch_size: int = 1
    thresholds: str | Mapping[str, Any] = UNIFORM
    platform: str | None = None

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"clipping must be one of {', '.join(STRATEGIES)}, got {self.name!r}")


@dataclasses.dataclass(frozen=True)
class _Factor:
    """What a gradient is multiplied by, from a bound on its norm.

    Attributes:
      clip: the public facts.
      norm: C at this step: a constant, or traced where it adapts.
      steps: the sensitivity in steps of a grid; None without one.
    """

    clip: Clip
    norm: Any
    steps: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.norm, jax.core.Tracer):
            if self.clip.kind == CLIP:
                raise ValueError("a clip norm that is computed has no known sensitivity: use `clip_scaling`=normalise")
        elif not self.norm >= SMALLEST_CLIP_NORM:
            raise ValueError(f"clip_norm must be at least {SMALLEST_CLIP_NORM:g}, got {self.norm:g}")
        elif self.clip.kind != CLIP and not self.norm < float("inf"):
            raise ValueError(f"scaling {self.clip.kind} needs a finite clip_norm")

    def __call__(self, norm: Any, margin: float, share: Any = 1.0) -> Any:
        """The factor by which a gradient's norm becomes at most `share` of the sensitivity, or of `steps` on a grid.

        Args:
          norm: a bound on the norm of each gradient, up to the relative rounding error `margin`.
        """
        factor = self._to_sensitivity(norm, margin, share)
        if self.steps is None:
            return factor
        # The steps themselves and two products are rounded.
        return factor * (self.steps / self.clip.sensitivity * (1 - 8 * norms.UNIT_ROUNDOFF))

    def _to_sensitivity(self, norm: Any, margin: float, share: Any) -> Any:
        if self.clip.kind == AUTOMATIC:
            return share * (1 - margin) / (norm + STABILISER)
        factor = jnp.minimum(1.0, share * self.norm * (1 - margin) / norm)
        return factor if self.clip.kind == CLIP else factor / self.norm * (1 - 4 * norms.UNIT_ROUNDOFF)

    def placed(self, scaled: Any) -> Any:
        """Scaled gradients as they are added: on a grid, whole numbers of steps, cut off towards zero."""
        return scaled if self.steps is None else scaled.astype(jnp.int32)


def _held(gradient_of_unit: Any) -> Any:
    """Returns a function that adds one microbatch to a total by forming the gradient of every unit, with its norm."""

    def add_microbatch(
        total: Any, loss: Any, params: Any, units: Any, keep: jax.Array, factor: _Factor
    ) -> tuple[Any, Any, Any]:
        def of_unit(unit: Any) -> Any:
            return gradient_of_unit(loss, params, unit)

        if keep.shape == (1,):
            one = of_unit(jax.tree.map(lambda x: x[0], units))
            losses, gradients, lengths = jax.tree.map(lambda x: x[None], one)
        else:
            losses, gradients, lengths = jax.vmap(of_unit)(units)
        factors, keep = factor(lengths, norms.margin(params)), keep & jnp.isfinite(lengths)

        def weighted(leaf: Any) -> Any:
            # A select, not a product with zero: 0 * inf is NaN.
            def term(i: Any) -> Any:
                scaled = factor.placed(leaf[i].astype(jnp.float32) * factors[i])
                return jnp.where(keep[i], scaled, jnp.zeros_like(scaled))

            # Few terms are added one by one, which fuses into a single pass over the total.
            return (
                sum(map(term, range(len(leaf))))
                if len(leaf) <= _FEW
                else jax.vmap(term)(jnp.arange(len(leaf))).sum(axis=0)
            )

        return jax.tree.map(jnp.add, total, jax.tree.map(weighted, gradients)), lengths, losses

    return add_microbatch


def _ghost(
    total: Any, loss: Any, params: Any, units: Any, keep: jax.Array, factor: _Factor, shards: Any, platform: str
) -> tuple[Any, Any, Any]:
    """Adds one microbatch from the operands of one backward pass."""
    kept = book_keeping.backward(loss, params, units, shards, platform)
    lengths = kept.norms()
    factors = factor(lengths.bound, norms.margin(params))
    total = _add_kept(total, kept, factors, keep & jnp.isfinite(lengths.bound), factor)
    return total, lengths.norm, kept.losses


def _per_layer(
    total: Any,
    loss: Any,
    params: Any,
    units: Any,
    keep: jax.Array,
    factor: _Factor,
    thresholds: Any,
    shards: Any,
    platform: str,
) -> tuple[Any, Any, Any]:
    """Adds one microbatch from the operands of one backward pass, with a bound of its own for every group."""
    kept = book_keeping.backward(loss, params, units, shards, platform)
    shares = kept.shares(thresholds)
    groups = kept.group_norms()
    # A unit that is not finite in one group is dropped in all.
    finite = [jnp.isfinite(n.bound).all(axis=0) for rules in groups for n in rules.values()]
    factors = [
        {rule: factor(n.bound, norms.margin(params), share[rule][:, None]) for rule, n in rules.items()}
        for rules, share in zip(groups, shares, strict=True)
    ]
    total = _add_kept(total, kept, factors, functools.reduce(operator.and_, finite, keep), factor)
    return total, kept.norms().norm, kept.losses


def _add_kept(total: Any, kept: book_keeping.Kept, factors: Any, keep: jax.Array, factor: _Factor) -> Any:
    """Adds the weighted gradients of a microbatch: on a grid unit by unit, because each is rounded by itself."""
    if factor.steps is None or len(keep) == 1:
        return jax.tree.map(jnp.add, total, kept.weighted_sums(factors, keep, factor.placed))

    def add_unit(i: Any, total: Any) -> Any:
        def one(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=x.ndim - 1)

        mine = kept.unit(i).weighted_sums(jax.tree.map(one, factors), one(keep), factor.placed)
        return jax.tree.map(jnp.add, total, mine)

    return jax.lax.fori_loop(0, len(keep), add_unit, total)


def clipped_sum(
    loss: Loss,
    params: Any,
    batch: Batch,
    clip: Clip,
    how: Strategy = Strategy(),
    *,
    norm: Any = None,
    steps: Any = None,
    shards: Any = None,
    together: tuple[str, ...] = (),
) -> ClippedSum:
    """Sum over the units of the batch of factor * grad(loss)(params, unit), in float32 or on a grid.

    Trailing padding is not computed at all: the loop ends after the last microbatch that holds a unit. Of units with
    several rows, "example_scan" computes the rows that are there, the other strategies all places.

    >>> rows = {"x": jnp.array([[3.0, 4.0], [0.3, 0.4], [9.0, 9.0]])}
    >>> batch = Batch.of_rows(rows, jnp.array([True, True, False]))  # the third slot is padding
    >>> def loss(w, unit):  # its gradient is the unit's row
    ...     return jnp.vdot(w, *unit.rows["x"])
    >>> clipped = clipped_sum(loss, jnp.zeros(2), batch, Clip(1.0))
    >>> clipped.sensitivity
    1.0
    >>> bool(jnp.allclose(clipped.total, jnp.array([0.6 + 0.3, 0.8 + 0.4]), rtol=1e-5))
    True

    Args:
      loss: scalar loss of one unit; must not depend on any other one. Of several rows, it is the mean of the losses of
        units that have one of the rows each.
      params: tree of parameters; exactly these are differentiated.
      batch: the drawn units.
      clip: the L2 bound per unit; inf turns clipping off (non-finite gradients are dropped all the same).
      norm: C at this step, where gradients are divided by it; by default that of `clip`.
      steps: of a grid, which the sensitivity shall be at most (at most 2^24); None for float32 sums.
      shards: inside shard_map, for every leaf of params the sharding.place.Gathered axis of which this device holds a
        shard, or None; "ghost" and "per_layer" only. The sums of such leaves are shards of the sum over all devices;
        those of the others, of this one.
      together: mesh axes whose devices go through the loop over microbatches equally often, each with padding where
        others have units: where the compiler divides the work on a unit, what it sends may wait for all of them.

    Returns:
      ClippedSum, with per-unit losses and norms for private use.

    Raises:
      ValueError: a clip norm that is not at least SMALLEST_CLIP_NORM, a `norm` where gradients are not divided
        by it, or slots that do not divide into microbatches.
      tracking.UntrackedUse: "ghost" or "per_layer" where a parameter is used by anything but privacy.operations.
    """
    if any(shards or ()) and how.name not in (GHOST, PER_LAYER):
        raise ValueError(
            f"{how.name} holds whole gradients, which sharded parameters are meant to avoid: use {GHOST} or {PER_LAYER}"
        )
    if norm is not None and clip.kind == CLIP:
        raise ValueError("a clip norm beside that of `clip` has no known sensitivity: use `clip_scaling`=normalise")
    factor = _Factor(clip, clip.norm if norm is None else norm, steps)
    platform = how.platform or jax.default_backend()
    mask, size, slots = batch.mask, how.microbatch_size, batch.slots
    if slots % size:
        raise ValueError(f"a batch of {slots} slots does not divide into microbatches of {size}")
    by_rows = how.name == EXAMPLE_SCAN and batch.places > 1
    if by_rows and size > 1:
        raise ValueError(f"{EXAMPLE_SCAN} takes the rows of units one by one: its microbatches have one unit")
    method = {
        EXAMPLE_SCAN: _held(example_gradient.gradient),
        GHOST: functools.partial(_ghost, shards=shards, platform=platform),
        PER_LAYER: functools.partial(_per_layer, thresholds=how.thresholds, shards=shards, platform=platform),
        VMAP: _held(example_gradient.plain_gradient),
    }[how.name]

    def add_microbatch(i: Any, carry: Any) -> Any:
        total, lengths, losses = carry

        def window(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size)

        keep = window(mask)
        total, length, value = method(total, loss, params, jax.tree.map(window, batch.units), keep, factor)

        def write(xs: Any, x: Any) -> Any:
            return jax.lax.dynamic_update_slice_in_dim(xs, jnp.where(keep, x.astype(jnp.float32), 0.0), i * size, 0)

        return total, write(lengths, length), write(losses, value)

    kind = jnp.float32 if steps is None else jnp.int32
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, kind), params)
    start = (zeros, jnp.zeros(slots), jnp.zeros(slots))
    if by_rows:
        total, lengths, losses = row_by_row.scaled_sum(loss, params, batch, factor, factor.placed, zeros, together)
    elif size == slots:  # no loop, whose windows a compiler could not keep sharded
        total, lengths, losses = add_microbatch(0, start)
    else:
        used = jnp.max(jnp.where(mask, jnp.arange(slots) // size + 1, 0), initial=0)
        for axis_name in {shard.axis_name for shard in shards or [] if shard} | set(together):
            used = jax.lax.pmax(used, axis_name)  # devices that gather from each other go through the loop together
        total, lengths, losses = jax.lax.fori_loop(0, used, add_microbatch, start)
    half: Any = 0.5 if steps is None else 1
    count = _count(mask, lengths, factor.norm, half) if clip.adapts else None
    return ClippedSum(total, PrivateStats(lengths, losses), sensitivity=clip.sensitivity, count=count, steps=steps)


def _count(mask: jax.Array, lengths: jax.Array, clip_norm: Any, half: Any) -> jax.Array:
    halves = jnp.where(lengths <= clip_norm, half, -half)
    # An empty unit counts 0, as an absent one does. If it counted 1/2, replacing it by a unit above the clip norm would
    # move the count by 1, and only 1/2 is charged.
    return jnp.where(mask & (lengths > 0) & jnp.isfinite(lengths), halves, jnp.zeros_like(halves)).sum()
