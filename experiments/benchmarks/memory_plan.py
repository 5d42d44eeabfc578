"""Memory of a whole private training step on one device of 80 GB, by ahead-of-time compilation for a TPU v5p (95 GiB),
with no TPU at hand.

The step is the trainer's own: gradients clipped one sequence at a time (--clipping=example_scan), noise, AdamW;
bfloat16 compute, activations recomputed block by block, rows of 1024 tokens. Trained parameters, both moments and the
sum of gradients are float32; frozen parameters bfloat16. What another compiler keeps in temporary buffers will differ;
what is held throughout will not. Prints a table to standard error and one JSON object.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import time

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

from jax.experimental import topologies

from dpgemma.gemma import decoder, lora
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.rules import MeshShape
from dpgemma.training.memory import held
from experiments.benchmarks.clipping_tpu import check_for_libtpu
from experiments.hardware.step_program import StepProgram

TOPOLOGY = "v5p:2x2x1"
DEVICE_BYTES = 80e9
PLANS = ("vaultgemma_1b", "gemma2_2b", "gemma3_4b:16")


def plan(name: str, rank: int | None, length: int, rows: int, at_once: int) -> dict:
    """Bytes of one step of a preset, fully trained or by adapters of a rank."""
    config = PRESETS[name]
    if rank:
        config = dataclasses.replace(config, lora=lora.adapters(config, rank, float(rank), "all"))
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[:1]
    one = mesh_lib.of_devices(device, MeshShape(1))
    start = time.perf_counter()
    program = StepProgram(config, one, length, rows, Strategy("example_scan", at_once))
    memory = program.trace().lower().compile().memory_analysis()
    trained, frozen = (decoder.count(part) for part in lora.split(config, decoder.parameter_shapes(config)))
    return {
        "model": name,
        "lora_rank": rank,
        "parameters": trained + frozen,
        "trained_parameters": trained,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes": held(memory),
        "fits_80_gb": held(memory) <= DEVICE_BYTES,
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", default=PLANS, metavar="MODEL[:LORA_RANK]")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64, help="of a batch; they are computed one after the other")
    parser.add_argument("--microbatch_size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    check_for_libtpu("memory_plan")
    rows = []
    for name in arguments.plans:
        model, _, rank = name.partition(":")
        rows.append(
            row := plan(
                model, int(rank) if rank else None, arguments.sequence_length, arguments.rows, arguments.microbatch_size
            )
        )
        print(
            f"{name:20s} {row['bytes'] / 1e9:.1f} GB, of which {row['state_bytes'] / 1e9:.1f} are held throughout",
            file=sys.stderr,
        )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    content = {
        "rows": rows,
        "sequence_length": arguments.sequence_length,
        "device_bytes": DEVICE_BYTES,
        "versions": versions,
    }
    print(json.dumps(content | {"hardware": f"{TOPOLOGY}, compiled on a host without one"}, indent=1))


if __name__ == "__main__":
    main()
