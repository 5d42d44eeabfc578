"""What a step takes on this computer, measured with rows of noise: where the machine planned for is at hand."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.batch import Batch
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import place
from dpgemma.training.step import TrainState
from experiments.hardware.step_program import StepProgram

_REPETITIONS = 3
_MOST_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by a line through two measurements: a step of few rounds of its loop, and one of more.

    Attributes:
      fixed: of noise, optimizer and all else that does not depend on the batch.
      of_round: of one round of the loop over microbatches.
      error: relative difference between the slowest and the fastest repetition of the longer measurement.
    """

    fixed: float
    of_round: float
    error: float

    def of(self, rounds: float) -> float:
        """Seconds of a step of so many rounds."""
        return self.fixed + rounds * self.of_round


def step_time(program: StepProgram, compiled: Any) -> StepTime:
    """Runs the compiled step with parameters that are all equal, and with few of the units of its batch."""
    mesh = program.mesh
    parameters = jax.tree.map(_filled, program.arrays.trainable)
    frozen = jax.tree.map(_filled, program.arrays.frozen)
    moments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), program.arrays.moments)
    state = TrainState(parameters, moments)
    rows = program.objective.noise_rows(program.rows)
    at_once = place.rows(mesh) * program.how.microbatch_size
    more = min(_MOST_ROUNDS, max(2, program.rounds))
    seconds: dict[int, list[float]] = {1: [], more: []}
    for repetition in range(_REPETITIONS + 1):  # the first one touches memory for the first time
        for rounds, found in seconds.items():
            batch = Batch.of_rows(rows, np.arange(program.rows) < rounds * at_once).dealt(place.rows(mesh))
            placed = jax.device_put(batch, place.over_units(mesh))
            keys = noise_keys(bytes(32), repetition)
            start = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, frozen, placed, keys, np.float32(1)))
            found.append(time.perf_counter() - start)
    one, longer = (min(found[1:]) for found in seconds.values())
    of_round = max(0.0, longer - one) / (more - 1)
    return StepTime(max(0.0, one - of_round), of_round, max(seconds[more][1:]) / longer - 1)


def _filled(leaf: Any) -> Any:
    return jnp.full(leaf.shape, 0.01, leaf.dtype, device=leaf.sharding)
