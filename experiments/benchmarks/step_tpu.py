"""Cycles and memory of a whole training step on TPU v6e, by its compiler, with no TPU at hand: an exact release against
float32 sums and noise.

The step is the trainer's own: gradients clipped by example_scan, sums over chips, noise, AdamW; float32 parameters,
bfloat16 compute, activations recomputed block by block; on several chips, parameters at rest, moments and noise are
spread over them. Cycles of a chip are the compiler's own static estimates (see hardware.cycles), without the time of
transfers between chips. The compiler has several rules for the order of a program's instructions; training uses the
first of --orders. Prints a line a program to standard error and one JSON object.

    python -m experiments.benchmarks.step_tpu --model=vaultgemma_1b --sequences=253
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import time

# The compiler needs no TPU; without these it asks the network and a lock file for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

from jax.experimental import topologies

from dpgemma.choices import EXACT, FLOAT32
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.rules import MeshShape
from dpgemma.training.memory import held
from dpgemma.training.step import COMPILER_OPTIONS
from experiments.benchmarks.clipping_tpu import CHIP, CHIPS, check_for_libtpu
from experiments.hardware import cycles as cycles_lib
from experiments.hardware.step_program import StepProgram

_ORDER = "xla_memory_scheduler"
ORDERS = (COMPILER_OPTIONS["tpu"][_ORDER], "post_order", "list")


def measure(model: str, length: int, sequences: int, at_once: int, chips: int, release: str, order: str) -> dict:
    """Figures of one step in which every chip takes `sequences` rows, `at_once` of them at a time."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIP if chips == 1 else CHIPS).devices
    mesh = mesh_lib.of_devices(devices[:chips], MeshShape(chips))
    rounds = -(-sequences // at_once)
    start = time.perf_counter()
    how = Strategy("example_scan", at_once)
    program = StepProgram(PRESETS[model], mesh, length, rounds * at_once * chips, how, release=release)
    compiled = program.trace().lower().compile({_ORDER: order})
    memory, cycles = compiled.memory_analysis(), cycles_lib.of(compiled.as_text(), rounds)
    return {
        "release": release,
        "chips": chips,
        "order": order,
        "cycles": cycles.corrected,
        "cycles_raw": cycles.raw,
        "bytes": held(memory),
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vaultgemma_1b", choices=sorted(PRESETS))
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument(
        "--sequences", type=int, default=253, help="of a chip; VaultGemma's batch on 2048 chips has 253"
    )
    parser.add_argument("--microbatch_size", type=int, default=2)
    parser.add_argument("--chips", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--orders", nargs="*", default=ORDERS, help="rules of the compiler")
    arguments = parser.parse_args()
    check_for_libtpu("step_tpu")
    rows = []
    for chips, order in itertools.product(arguments.chips, arguments.orders):
        for release in (EXACT, FLOAT32):
            size = arguments.sequence_length, arguments.sequences, arguments.microbatch_size
            rows.append(row := measure(arguments.model, *size, chips, release, order))
            figures = f"{row['cycles'] / 1e6:.0f} Mcycles, {row['bytes'] / 2**30:.3f} GiB"
            seconds = f"compiled in {row['compile_seconds']:.0f} s"
            print(f"{chips} chips, {order}, {release}: {figures}, {seconds}", file=sys.stderr)
    exact, float32 = rows[::2], rows[1::2]
    content = {
        "model": arguments.model,
        "sequence_length": arguments.sequence_length,
        "sequences_a_chip": arguments.sequences,
        "microbatch_size": arguments.microbatch_size,
        "rows": rows,
        "exact_against_float32": [
            {
                "chips": row["chips"],
                "order": row["order"],
                "cycles": row["cycles"] / other["cycles"],
                "bytes": row["bytes"] / other["bytes"],
            }
            for row, other in zip(exact, float32, strict=True)
        ],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "hardware": "TPU v6e, compiler estimates on a host without one",
    }
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
