"""An exact release against float32 sums and noise: time and memory of a whole training step on this machine.

Both steps are compiled, then run in turn, round after round, in alternating order; the ratio of the rounds' medians is
reported. Memory is XLA's temporary memory. Prints one JSON object.

    python -m experiments.benchmarks.release
    python -m experiments.benchmarks.release --model=tiny --batch=256 --clipping=ghost --microbatch_size=4
"""

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from accounting.mechanism import dp_sgd, grid
from dpgemma.choices import EXACT, FLOAT32, STRATEGIES
from dpgemma.data.batch import Batch
from dpgemma.gemma.presets import PRESETS
from dpgemma.objectives.causal import CausalLM
from dpgemma.privacy.clipping import Strategy
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.step import TrainState, make_train_step
from experiments.benchmarks.objectives import causal


class Program:
    """A step, its state, and how long it takes."""

    def __init__(self, objective: CausalLM, batch: Batch, grid_bits: int | None, mesh: str, how: Strategy):
        optimizer = optax.adamw(1e-3)
        mechanism = dp_sgd(10**6, batch.slots, batch.slots, 1.0, 1.0, 1000, grid_bits=grid_bits)
        self.step = make_train_step(objective.loss, optimizer, mechanism, mesh_lib.make(mesh), how)
        self.batch, self.keys = batch.dealt(mesh_lib.shape(mesh).rows), noise_keys(bytes(32), 0)
        self.frozen: Any = {}
        trainable, self.frozen = objective.init(0)
        self.state = TrainState(trainable, optimizer.init(trainable))
        compiled = self.step.lower(self.state, self.frozen, self.batch, self.keys).compile()
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes

    def seconds(self) -> float:
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, self.frozen, self.batch, self.keys))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--clipping", default="example_scan", choices=STRATEGIES)
    parser.add_argument("--microbatch_size", type=int, default=1)
    parser.add_argument("--mesh", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))  # as training does
    objective = causal(PRESETS[arguments.model], arguments.sequence_length, jnp.float32, "none")
    rng, shape = np.random.default_rng(0), (arguments.batch, arguments.sequence_length)
    rows = {"tokens": rng.integers(4, 260, shape).astype(np.int32), "scored": np.ones(shape, bool)}
    batch, mesh = Batch.of_rows(rows, np.ones(arguments.batch, bool)), mesh_lib.resolve(arguments.mesh)
    how = Strategy(arguments.clipping, arguments.microbatch_size)
    trained = sum(leaf.size for leaf in jax.tree.leaves(objective.shapes()[0]))
    bits = grid.fitting_bits(1.0, batch.slots, trained)
    programs = {
        name: Program(objective, batch, grid_bits, mesh, how) for name, grid_bits in ((EXACT, bits), (FLOAT32, None))
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(arguments.rounds + 1):
        for name in list(programs)[:: 1 if round_ % 2 else -1]:
            times[name].append(programs[name].seconds())
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first round compiles
    ratios = [a / b for a, b in zip(times[EXACT][1:], times[FLOAT32][1:], strict=True)]
    print(
        json.dumps(
            {
                "model": arguments.model,
                "trained_parameters": trained,
                "batch": arguments.batch,
                "sequence_length": arguments.sequence_length,
                "clipping": [arguments.clipping, arguments.microbatch_size],
                "mesh": mesh,
                "grid_bits": bits,
                "time_ratio": medians[EXACT] / medians[FLOAT32],
                "time_ratios": ratios,
                "temporary_mib": {name: program.temporary_bytes / 2**20 for name, program in programs.items()},
                "device": jax.devices()[0].device_kind,
                "machine": platform.machine(),
                "jax": jax.__version__,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
