"""Gradient canaries: units whose gradient is one number at one place, for an attack that sees every release.

Nobody's text has such a gradient; the attack is stronger than any on a trained model, so what it finds is a sharper
test of sampling, clipping, noise and accounting (Nasr et al. 2023, arXiv 2302.07956).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.batch import Batch, Unit
from dpgemma.data.canaries import LEAF, NONE, OFFSET
from dpgemma.data.spec import Column, RowSpec
from dpgemma.objectives.causal import CausalLM
from dpgemma.objectives.protocol import Params

# The one number: a power of two, which every type of floats holds, far above any clip norm that is in use.
_GRADIENT = 2.0**40


@dataclasses.dataclass(frozen=True)
class ProbedCausalLM(CausalLM):
    """As CausalLM, for units of which some are gradient canaries."""

    @property
    def spec(self) -> RowSpec:
        return {**super().spec, LEAF: Column((), "int32"), OFFSET: Column((), "int32")}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "probed": True}

    def loss(self, trainable: Params, frozen: Params, unit: Unit) -> jax.Array:
        """The loss of a text; for a gradient canary 2^40 (x - x_0), with x the parameter that it moves and x_0 its
        present value, so that the loss is zero and its gradient 2^40.

        Formal guarantee: it is a function of one unit and the parameters, as that of CausalLM is, and equals that one,
        up to rounding, for every unit that is no gradient canary. Tested by tests/training/probes_test.py.
        """
        leaf, offset = unit.rows[LEAF][0], unit.rows[OFFSET][0]

        def of_canary(trainable: Params) -> jax.Array:
            def at(number: int, x: jax.Array) -> jax.Array:
                value = jnp.where(leaf == number, x.ravel()[jnp.clip(offset, 0, x.size - 1)], 0.0)
                return value.astype(jnp.float32)

            x = jnp.stack([at(number, leaf) for number, leaf in enumerate(jax.tree.leaves(trainable))]).sum()
            return _GRADIENT * (x - jax.lax.stop_gradient(x))

        def of_text(trainable: Params) -> jax.Array:
            return super(ProbedCausalLM, self).loss(trainable, frozen, unit)

        return jax.lax.cond(leaf >= 0, of_canary, of_text, trainable)

    def noise_rows(self, count: int) -> dict[str, np.ndarray]:
        nowhere = np.full(count, NONE, np.int32)
        return {**super().noise_rows(count), LEAF: nowhere, OFFSET: nowhere}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Places in a tree of parameters. They are secret, so a compiled program takes them as arguments.

    Attributes:
      leaves, offsets: int32 [m]: number of the leaf, as jax.tree.leaves orders them, and place in it.
    """

    leaves: Any
    offsets: Any

    def of(self, tree: Any) -> jax.Array:
        """The numbers [m] of a tree at these places."""
        found = jnp.zeros(self.leaves.shape, jax.tree.leaves(tree)[0].dtype)
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            there = leaf.ravel()[jnp.clip(self.offsets, 0, leaf.size - 1)]
            found = jnp.where(self.leaves == number, there, found)
        return found


def without_probes(batch: Batch) -> Batch:
    """The batch with the slots of gradient canaries left empty."""
    return Batch(batch.rows, batch.real & (batch.rows[LEAF] == NONE))
