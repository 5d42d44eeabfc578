"""One backward pass over a microbatch whose result is kept as operands of products, not as gradients."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.privacy import ghost_norms, tracking


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How one leaf of the parameters is used.

    Attributes:
      shape: of the leaf: layer axes, then those that an operation sees.
      layers: how many leading axes are layer axes.
      uses: by rule.
    """

    shape: tuple[int, ...]
    layers: int
    uses: dict[str, tracking.Use]

    @classmethod
    def of(cls, leaf, uses: dict[str, tracking.Use]) -> "Parameter":
        layers = leaf.ndim - len(next(iter(uses.values())).shape) if uses else 0
        return cls(leaf.shape, layers, uses)

    def taps(self, batch: int) -> dict:
        """Zeros for every array that the rules need: [*layer axes, B, ...]."""
        shape = lambda tap: (*self.shape[: self.layers], batch, *tap.shape)
        return {rule: {name: jnp.zeros(shape(tap), tap.dtype) for name, tap in use.taps.items()} for rule, use in self.uses.items()}

    def axes(self) -> dict:
        """Where B lies in each of them."""
        return {rule: dict.fromkeys(use.taps, self.layers) for rule, use in self.uses.items()}

    def by_layer(self, taps: dict) -> dict:
        """The taps with one leading axis of layers in place of any number: [L, B, ...]."""
        return jax.tree.map(lambda x: x.reshape(math.prod(x.shape[: self.layers]), *x.shape[self.layers :]), taps)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one backward pass left: for every parameter, operands by layer and example."""

    parameters: list[Parameter]
    taps: list[dict]
    losses: jax.Array
    structure: Any

    def norms(self) -> list[ghost_norms.Norms | None]:
        """Of every parameter, [L, B]; None for parameters that the loss does not use."""
        platform = jax.default_backend()
        of_layer = jax.vmap(lambda taps: ghost_norms.example_norms(taps, platform))
        return [jax.lax.map(of_layer, taps) if p.uses else None for p, taps in zip(self.parameters, self.taps, strict=True)]

    def weighted_sums(self, factors: list, keep_B):
        """The tree of sums over the examples of factor * gradient, in float32.

        Args:
          factors: of every parameter, for each of its rules an array [L, B].
          keep_B: bool; examples that are not kept contribute exact zeros.
        """
        sums = [self._weighted_sum(*item, keep_B) for item in zip(self.parameters, self.taps, factors, strict=True)]
        return self.structure.unflatten(sums)

    def _weighted_sum(self, parameter: Parameter, taps: dict, factors: dict, keep_B):
        total = jnp.zeros(parameter.shape, jnp.float32)
        for rule, use in parameter.uses.items():
            of_layer = lambda taps, factors, use=use: ghost_norms.weighted_sum(use, taps, factors, keep_B)
            total = total + jax.vmap(of_layer)(taps[rule], factors[rule]).reshape(parameter.shape)
        return total


def backward(loss, params, examples) -> Kept:
    """Runs the loss of every example forward and backward once.

    Args:
      loss: loss(params, example) -> scalar; parameters are opened by privacy.operations only.
      examples: tree of arrays with a leading axis of B examples.

    Raises:
      tracking.UntrackedUse: a parameter is used in a way that has no norm rule.
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    uses = tracking.audit(loss, params, example)
    leaves, structure = jax.tree.flatten(params)
    parameters = [Parameter.of(leaf, uses.get(name, {})) for leaf, name in zip(leaves, tracking.leaf_names(params), strict=True)]
    batch = jax.tree.leaves(examples)[0].shape[0]

    def losses(taps):
        of_example = lambda taps, example: loss(tracking.boxes(params, taps), example)
        return jax.vmap(of_example, in_axes=([p.axes() for p in parameters], 0))(taps, examples)

    values, pull_back = jax.vjp(losses, [p.taps(batch) for p in parameters])
    # Without the barrier a compiler may make an operand twice, for the norm and for the sum, and round it differently.
    taps, values = jax.lax.optimization_barrier((pull_back(jnp.ones_like(values))[0], values))
    return Kept(parameters, [p.by_layer(t) for p, t in zip(parameters, taps, strict=True)], values, structure)
