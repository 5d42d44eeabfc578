"""One backward pass over a microbatch whose result is kept as operands of products, not as gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.choices import BY_DIMENSION, UNIFORM
from dpgemma.privacy import norm_rules, tracking
from dpgemma.privacy import uses as audit
from dpgemma.sharding.place import Gathered


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How one leaf of the parameters is used.

    Attributes:
      shape: of the leaf on this device: layer axes, then those that an operation sees.
      layers: how many leading axes are layer axes.
      uses: by rule.
      shard: which part of the leaf this device holds, if it is spread over devices.
    """

    shape: tuple[int, ...]
    layers: int
    uses: dict[str, tracking.Use]
    shard: Gathered | None = None

    @classmethod
    def of(cls, leaf: Any, uses: dict[str, tracking.Use], shard: Gathered | None = None) -> "Parameter":
        layers = leaf.ndim - len(next(iter(uses.values())).shape) if uses else 0
        if shard and not layers - leaf.ndim <= shard.axis < 0:
            raise ValueError(
                f"axis {shard.axis} of a parameter {leaf.shape} with {layers} layer axes cannot be spread over devices"
            )
        return cls(leaf.shape, layers, uses, shard)

    def taps(self, batch: int) -> dict[str, Any]:
        """Zeros for every array that the rules need: [*layer axes, B, ...]."""

        def shape(tap: Any) -> Any:
            return (*self.shape[: self.layers], batch, *tap.shape)

        return {
            rule: {name: jnp.zeros(shape(tap), tap.dtype) for name, tap in use.taps.items()}
            for rule, use in self.uses.items()
        }

    def axes(self) -> dict[str, Any]:
        """Returns the index of the axis B in each of the taps."""
        return {rule: dict.fromkeys(use.taps, self.layers) for rule, use in self.uses.items()}

    @property
    def num_layers(self) -> int:
        return math.prod(self.shape[: self.layers])

    def by_layer(self, taps: dict[str, Any]) -> dict[str, Any]:
        """The taps with one leading axis of layers in place of any number: [L, B, ...]."""
        return jax.tree.map(lambda x: x.reshape(self.num_layers, *x.shape[self.layers :]), taps)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one backward pass left: for every parameter, operands by layer and example."""

    names: list[str]
    parameters: list[Parameter]
    taps: list[dict[str, Any]]
    losses: jax.Array
    structure: Any
    platform: str

    def norms(self) -> norm_rules.Norms:
        """Returns the Norms of each example's whole gradient, [B]."""
        of_parameter = [jax.tree.map(lambda x: x.sum(axis=0), self._norms(taps)) for taps in self.taps if taps]
        return functools.reduce(
            norm_rules.Norms.__add__, of_parameter, norm_rules.Norms(*[jnp.zeros(self.losses.shape)] * 3)
        )

    def group_norms(self) -> list[dict[str, Any]]:
        """Returns, for every parameter and each of its rules, the Norms of each layer's gradient, [L, B]."""
        return [{rule: self._norms({rule: taps[rule]}) for rule in taps} for taps in self.taps]

    def _norms(self, taps: dict[str, Any]) -> norm_rules.Norms:
        return jax.lax.map(jax.vmap(lambda taps: norm_rules.example_norms(taps, self.platform)), taps)

    def shares(self, thresholds: str | Mapping[str, Any]) -> list[dict[str, Any]]:
        """For every parameter and each rule by which it is used, [L] shares of one norm that bound all groups together.

        Args:
          thresholds: as clipping.clipped_sum takes them.

        Raises:
          ValueError: an unknown word; or a name, a number of layers or a share that does not fit.
        """
        weights = [
            {rule: _weight(thresholds, name, p) for rule in p.uses}
            for name, p in zip(self.names, self.parameters, strict=True)
        ]
        # Groups of one parameter overlap, so their bounds add before they are squared.
        together = math.sqrt(sum(float(np.square(sum(groups.values())).sum()) for groups in weights if groups))
        return [{rule: jnp.asarray(w / together, jnp.float32) for rule, w in groups.items()} for groups in weights]

    def unit(self, i: Any) -> "Kept":
        """What one of the examples left, as a microbatch of one."""

        def one(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=axis)

        taps = [jax.tree.map(lambda x: one(x, 1), tap) for tap in self.taps]  # [L, B, ...]
        return dataclasses.replace(self, taps=taps, losses=one(self.losses, 0))

    def weighted_sums(self, factors: Any, keep_B: jax.Array, placed: Callable[[Any], Any]) -> Any:
        """The tree of sums over the examples of factor * gradient, in float32.

        Args:
          factors: [B]; or for every parameter and each of its rules [L, B].
          keep_B: bool; examples that are not kept contribute exact zeros.
          placed: applied to every sum before devices add theirs.
        """
        if not isinstance(factors, list):
            factors = [
                {rule: jnp.broadcast_to(factors, (p.num_layers, *factors.shape)) for rule in p.uses}
                for p in self.parameters
            ]
        items = zip(self.parameters, self.taps, factors, strict=True)
        sums = [self._weighted_sum(*item, keep_B, placed) for item in items]
        return jax.tree.unflatten(self.structure, sums)

    @staticmethod
    def _weighted_sum(
        parameter: Parameter,
        taps: dict[str, Any],
        factors: dict[str, Any],
        keep_B: jax.Array,
        placed: Callable[[Any], Any],
    ) -> Any:
        def of_layer(layer: Any) -> Any:
            taps, factors = layer
            uses = parameter.uses.items()
            whole = sum(norm_rules.weighted_sum(use, taps[rule], factors[rule], keep_B) for rule, use in uses)
            whole = placed(whole)
            return parameter.shard.sum_and_scatter(whole) if parameter.shard else whole

        if not parameter.uses:
            return placed(jnp.zeros(parameter.shape))
        # Whole arrays of all layers are what sharding has to avoid.
        by_layer = functools.partial(jax.lax.map, of_layer) if parameter.shard else jax.vmap(of_layer)
        return by_layer((taps, factors)).reshape(parameter.shape)


def _weight(thresholds: Any, name: str, parameter: Parameter) -> np.ndarray:
    """The relative bound of one group in each layer, [L]."""
    if thresholds == UNIFORM:
        return np.ones(parameter.num_layers)
    if thresholds == BY_DIMENSION:
        return np.full(parameter.num_layers, math.sqrt(math.prod(next(iter(parameter.uses.values())).shape)))
    if isinstance(thresholds, str) or name not in thresholds:
        given = thresholds if isinstance(thresholds, str) else "thresholds"
        raise ValueError(
            f"{given} has no share for parameter {name}: use {UNIFORM}, {BY_DIMENSION} or a share for every name"
        )
    weight = np.broadcast_to(np.asarray(thresholds[name], float), (parameter.num_layers,))
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(f"the shares of parameter {name} must be positive and finite, got {thresholds[name]}")
    return weight


def backward(loss: Any, params: Any, examples: Any, shards: list[Any] | None = None, platform: str = "cpu") -> Kept:
    """Runs the loss of every example forward and backward once.

    Args:
      loss: loss(params, example) -> scalar; parameters are opened by privacy.operations only.
      examples: tree of arrays with a leading axis of B examples.
      shards: for every leaf of the parameters, the axis that is spread over devices, or None.
      platform: for which the cheaper way to a norm is chosen.

    Raises:
      tracking.UntrackedUse: a parameter is used in a way that has no norm rule.
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    leaves, structure = jax.tree.flatten(params)
    shards = shards or [None] * len(leaves)
    whole = [
        jax.ShapeDtypeStruct(g.whole(x.shape) if g else x.shape, x.dtype) for x, g in zip(leaves, shards, strict=True)
    ]
    uses = audit.uses_of(loss, jax.tree.unflatten(structure, whole), example)
    names = tracking.leaf_names(params)
    parameters = [Parameter.of(x, uses.get(name, {}), g) for x, name, g in zip(leaves, names, shards, strict=True)]
    batch = jax.tree.leaves(examples)[0].shape[0]

    def losses(taps: Any) -> Any:
        def of_example(taps: Any, example: Any) -> Any:
            return loss(tracking.boxes(params, taps, shards=shards), example)

        return jax.vmap(of_example, in_axes=([p.axes() for p in parameters], 0))(taps, examples)

    values, pull_back = jax.vjp(losses, [p.taps(batch) for p in parameters])
    # Without the barrier a compiler may make an operand twice, for the norm and for the sum, and round it differently.
    taps, values = jax.lax.optimization_barrier((pull_back(jnp.ones_like(values))[0], values))
    return Kept(
        names, parameters, [p.by_layer(t) for p, t in zip(parameters, taps, strict=True)], values, structure, platform
    )
