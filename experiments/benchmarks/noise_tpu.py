"""Cycles of a step's noise on a TPU v6e, by its compiler: whole numbers on a grid, and four float32 normals.

The programs take the summed gradients of one model, which every chip holds, and return the noised sum in float32; where
there are several chips, each makes a part of the whole numbers for all. Cycles of a chip are the compiler's own static
estimates (see tpu_cycles), without the time of transfers between chips. Prints one JSON object; compare with the cycles
of the gradients by experiments.benchmarks.clipping_tpu, times the sequences that a chip takes in a step.

    python -m experiments.benchmarks.noise_tpu --model=vaultgemma_1b
"""

import argparse
import functools
import importlib.metadata
import json
import os
import time

# The compiler needs no TPU; without these it asks the network and a lock file for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from accounting.mechanism import dp_sgd
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import ClippedSum, PrivateStats
from dpgemma.privacy.noisers import noiser_of
from dpgemma.sharding import place
from dpgemma.sharding.rules import DATA_AXIS
from experiments.benchmarks import tpu_cycles
from experiments.benchmarks.clipping_tpu import CHIP, CHIPS, check_for_libtpu


def measure(model: str, grid_bits: int | None, chips: int) -> dict:
    """Figures of the noise of one step on 1 or on 16 chips."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIP if chips == 1 else CHIPS).devices
    mesh = Mesh(np.array(devices[:chips]), (DATA_AXIS,))
    in_parts = functools.partial(place.in_parts, mesh)
    noiser = noiser_of(dp_sgd(10**6, 1000, 1000, 1.0, 1.0, 1, grid_bits=grid_bits))
    steps = noiser.steps(noiser.multiplier)
    shapes, kind = decoder.parameter_shapes(PRESETS[model]), jnp.float32 if steps is None else jnp.int32

    def noised(total, keys):
        nobody = PrivateStats(jnp.zeros(1), jnp.zeros(1))
        clipped = ClippedSum(total, nobody, sensitivity=1.0, steps=steps)
        return noiser.add(clipped, (), keys, noiser.multiplier, in_parts)[0].total

    everywhere = place.replicated(mesh)
    total = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind, sharding=everywhere), shapes)
    keys = jax.ShapeDtypeStruct((5, 2), jnp.uint32, sharding=everywhere)
    start = time.perf_counter()
    compiled = jax.jit(noised, donate_argnums=0).lower(total, keys).compile()
    cycles = tpu_cycles.of(compiled.as_text(), 1)
    return {
        "release": "float32" if grid_bits is None else "exact",
        "chips": chips,
        "cycles": cycles.corrected,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vaultgemma_1b", choices=sorted(PRESETS))
    model = parser.parse_args().model
    check_for_libtpu("noise_tpu")
    rows = [measure(model, bits, chips) for bits, chips in ((20, 1), (20, 16), (None, 1))]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(json.dumps({"model": model, "rows": rows, "versions": versions, "hardware": "TPU v6e, estimated"}, indent=1))


if __name__ == "__main__":
    main()
