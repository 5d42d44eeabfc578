"""The trainer's own step of a model on a mesh, traced from shapes alone: no array is made and no device is needed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from accounting.mechanism import dp_sgd, grid
from dpgemma.choices import EXACT
from dpgemma.data.batch import Batch
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.start import StartingPoint
from dpgemma.objectives.causal import CausalLM
from dpgemma.privacy.clipping import Strategy
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import place
from dpgemma.sharding.place import Layout, Places
from dpgemma.sharding.rules import MODEL_AXIS
from dpgemma.training import optimizer
from dpgemma.training.memory import Arrays, placed
from dpgemma.training.optimizer import Optimization
from dpgemma.training.step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One step: what it computes, where its arrays lie.

    Attributes:
      config: of the model, its adapters included.
      mesh: of devices that need not exist.
      length: tokens of a row.
      rows: slots of a batch.
      how: clipping, and how many rows a row of devices takes at once.
      dtype: of weights in use and of activations.
      remat: what the backward pass computes again.
      release: exact or float32.
    """

    config: GemmaConfig
    mesh: Mesh
    length: int
    rows: int
    how: Strategy
    dtype: str = "bfloat16"
    remat: str = "block"
    release: str = EXACT

    @functools.cached_property
    def objective(self) -> CausalLM:
        start = StartingPoint("planned", self.config)
        spread = MODEL_AXIS in self.mesh.shape
        return CausalLM(start, ByteTokenizer(), self.length, self.dtype, self.remat, vocabulary_is_spread=spread)

    @functools.cached_property
    def places(self) -> Places:
        """Raises InputError where an axis does not divide among the devices."""
        return Layout(self.mesh).places(self.objective.axes(), self.objective.shapes())

    @property
    def rounds(self) -> int:
        """How often the loop over microbatches runs."""
        return -(-self.rows // (place.rows(self.mesh) * self.how.microbatch_size))

    @functools.cached_property
    def arrays(self) -> Arrays:
        return Arrays.of(self.objective, self.mesh, self._optimizer, self.dtype)

    def known_bytes(self) -> dict[str, int]:
        """What one chip holds by shapes alone, in bytes."""
        return self.arrays.known_bytes(self.how.name, self.how.microbatch_size)

    @functools.cached_property
    def _optimizer(self) -> Any:
        return optimizer.make(Optimization("adamw", 1e-3, 10, "cosine", 0.0, 100))

    def trace(self) -> Any:
        """The step as JAX traces it; it can be lowered and compiled."""
        row = jax.ShapeDtypeStruct((self.rows, 1, self.length), bool)
        over_units = place.over_units(self.mesh)
        columns = {"tokens": placed(row, over_units, jnp.int32), "scored": placed(row, over_units)}
        batch = Batch(columns, placed(jax.ShapeDtypeStruct((self.rows, 1), bool), over_units))
        parameters = decoder.count(self.arrays.trainable)
        bits = grid.fitting_bits(1.0, self.rows, parameters) if self.release == EXACT else None
        mechanism = dp_sgd(max(10**6, self.rows), self.rows, self.rows, 1.0, 1.0, 100, "zero_out", grid_bits=bits)
        step = make_train_step(
            self.objective.loss, self._optimizer, mechanism, self.mesh, self.how, self.places, self.objective.cast
        )
        keys = placed(jax.eval_shape(lambda: noise_keys(bytes(32), 0)), place.replicated(self.mesh))
        state = TrainState(self.arrays.trainable, self.arrays.moments)
        return step.program.trace(state, self.arrays.frozen, batch, keys, step.noise_multiplier, step.probes)
