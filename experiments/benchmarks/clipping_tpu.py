"""Cycles and memory of per-example clipping on a TPU v6e, by its compiler, with no TPU at hand.

Every program accumulates the gradients of 64 sequences per chip: ours, the ordinary gradient and jax_privacy's
clipped_grad, each at several microbatch sizes, for bfloat16 parameters and a float32 accumulator, or for an exact
release one of whole numbers. Cycles are the
compiler's own static estimates (see hardware.cycles: plausible to some 20 % between programs with a similar mix of
operations; absolute times must not be derived from them). Prints a table to standard error and one JSON object.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time

# The compiler needs no TPU; without these it asks the network and a lock file for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from accounting.mechanism import Clip
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.objectives.causal import token_losses
from dpgemma.privacy import clipping, tracking
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place as place_lib
from dpgemma.sharding.place import Gathered, Layout
from dpgemma.sharding.rules import DATA_AXIS, MeshShape
from dpgemma.training.memory import held
from dpgemma.training.step import COMPILER_OPTIONS
from experiments.benchmarks import peers
from experiments.benchmarks.objectives import causal, of_row
from experiments.hardware import cycles as cycles_lib

jax_privacy = peers.imported("jax_privacy.clipping")

SEQUENCES = 64
CHIP, CHIPS = "v6e:2x2x1", "v6e:4x4x1"
REPLICATED = (
    "non_private:2",
    "non_private:4",
    "non_private:8",
    "example_scan:1",
    "example_scan_exact:1",
    "example_scan:2",
    "example_scan_exact:2",
    "ghost:1",
    "ghost:2",
)
PEERS = ("jax_privacy:1", "jax_privacy:2", "jax_privacy:4")
SHARDED = (
    "non_private_sharded:1",
    "non_private_sharded:2",
    "non_private_sharded:4",
    "ghost_sharded:1",
    "ghost_sharded:2",
)
_OVER_MODEL = re.compile(r"(\w+)_model(\d+)")


def check_for_libtpu(command: str) -> None:
    """Exits with 2 and one sentence where programs cannot be compiled for TPU."""
    if importlib.util.find_spec("libtpu") is None:
        print(f"{command}: compiling for TPU needs the libtpu package: pip install 'dpgemma[tpu]'", file=sys.stderr)
        raise SystemExit(2)


class Compiler:
    """Compiles gradient programs of one model for a TPU topology."""

    def __init__(self, model: str, length: int, compiler_options: dict | None = None):
        self.compiler_options = compiler_options
        self.config, self.length = PRESETS[model], length
        self.shapes = decoder.parameter_shapes(self.config)
        self.options = dict(bos=2, dtype=jnp.bfloat16, remat="block")
        self.objective = causal(self.config, length, jnp.bfloat16, "block")

    def compile(self, program: str):
        """Returns (compiled program, rounds of its loop) for "name:sequences at once per chip"."""
        name, _, size = program.partition(":")
        if match := _OVER_MODEL.fullmatch(name):
            return self._over_model(match[1], int(match[2]), int(size))
        sharded = name.endswith("_sharded")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS if sharded else CHIP).devices
        mesh = Mesh(np.array(devices if sharded else devices[:1]), (DATA_AXIS,))
        axes = [_spread_axis(leaf.shape, mesh.size) if sharded else None for leaf in jax.tree.leaves(self.shapes)]
        structure = jax.tree.structure(self.shapes)
        specs = structure.unflatten(
            [_spec(leaf, axis) for leaf, axis in zip(jax.tree.leaves(self.shapes), axes, strict=True)]
        )
        gathered = [None if axis is None else Gathered(DATA_AXIS, axis) for axis in axes]
        return self._compile(name.removesuffix("_sharded"), int(size), mesh, specs, specs, gathered)

    def _over_model(self, name: str, model: int, size: int):
        """Layers spread over chips as training spreads them, on two rows of chips."""
        shape = MeshShape(2, model)
        devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS).devices
        mesh = mesh_lib.of_devices(devices[: shape.devices], shape)
        self.options["vocabulary_is_spread"] = True
        self.objective = causal(self.config, self.length, jnp.bfloat16, "block", vocabulary_is_spread=True)
        places = Layout(mesh).places(self.objective.axes(), self.objective.shapes())
        specs, manual = place_lib.specs(places.in_use), jax.tree.map(lambda _: PartitionSpec(), self.shapes)
        return self._compile(name, size, mesh, specs, manual, [None] * len(jax.tree.leaves(specs)))

    def _compile(self, name: str, size: int, mesh, specs, manual, gathered):
        """The program on a mesh.

        Args:
          specs: of parameters and total.
          manual: those that name only the axes along which the program itself says what a chip does.
        """
        at_once, rounds = size * mesh.shape[DATA_AXIS], SEQUENCES // size

        def place(leaf, spec, dtype):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(mesh, spec))

        def tree(dtype):
            return jax.tree.map(functools.partial(place, dtype=dtype), self.shapes, specs)

        rows = PartitionSpec(None, DATA_AXIS)
        row = jax.ShapeDtypeStruct((rounds, at_once, self.length), bool)
        batch = {"tokens": place(row, rows, jnp.int32), "scored": place(row, rows, jnp.bool_)}
        gradient = getattr(self, name)

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(manual, manual, rows),
            out_specs=(manual, PartitionSpec(None)),
            axis_names={DATA_AXIS},
            check_vma=False,
        )
        def step(params, total, batch):
            def add(total, rows):
                one, private = gradient(params, rows, gathered)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, one), private

            return jax.lax.scan(add, total, batch)

        kind = jnp.int32 if name.endswith("_exact") else jnp.float32
        lowered = jax.jit(step, donate_argnums=1).lower(tree(jnp.bfloat16), tree(kind), batch)
        return lowered.compile(self.compiler_options), rounds

    def non_private(self, params, rows, gathered):
        def total(params):
            boxes = tracking.boxes(params, [{}] * len(gathered), keep=False, shards=gathered)
            losses = token_losses(self.config, boxes, rows, **self.options)
            return (losses.sum(axis=1) / rows["scored"].sum(axis=1)).sum()

        value, gradient = jax.value_and_grad(total)(params)
        return gradient, value

    def _clipped(self, params, rows, gathered, strategy, steps=None):
        size = len(rows["tokens"])
        units, shards = Batch.of_rows(rows, jnp.ones(size, bool)), gathered if any(gathered) else None
        # The rules choose by the platform that a program is compiled for, which is not the one that it is compiled on.
        how = Strategy(strategy, size, platform="tpu")

        def of_unit(params, unit):
            return self.objective.loss(params, {}, unit)

        clipped = clipping.clipped_sum(of_unit, params, units, Clip(1.0), how, shards=shards, steps=steps)
        return clipped.total, clipped.stats.norms.sum()

    def example_scan(self, *inputs):
        return self._clipped(*inputs, "example_scan")

    def example_scan_exact(self, *inputs):
        return self._clipped(*inputs, "example_scan", steps=2.0**20)

    def ghost(self, *inputs):
        return self._clipped(*inputs, "ghost")

    def per_layer(self, *inputs):
        return self._clipped(*inputs, "per_layer")

    def jax_privacy(self, params, rows, gathered):
        # Its own loop over microbatches would surround the same program: it is spared that.
        clip = jax_privacy.clipping.clipped_grad(
            of_row(self.objective), l2_clip_norm=1.0, batch_argnums=1, keep_batch_dim=False
        )
        return clip(params, rows), jnp.zeros(())


def _spread_axis(shape: tuple[int, ...], chips: int) -> int | None:
    """The longest axis that divides over the chips, counted from the end; None for small arrays. Layer axes are short
    and never chosen.
    """
    axes = [i for i, n in enumerate(shape) if n % chips == 0 and n >= 8 * chips] if math.prod(shape) > 2**20 else []
    return max(axes, key=lambda i: shape[i]) - len(shape) if axes else None


def _spec(leaf, axis: int | None) -> PartitionSpec:
    return PartitionSpec(*(DATA_AXIS if axis is not None and i == leaf.ndim + axis else None for i in range(leaf.ndim)))


def measure(compiler: Compiler, program: str, keep: str | None) -> dict:
    """Figures of one program per sequence and chip."""
    start = time.perf_counter()
    compiled, rounds = compiler.compile(program)
    seconds, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    if keep:
        with open(os.path.join(keep, program.replace(":", "_") + ".hlo"), "w") as file:
            file.write(text)
    cycles = cycles_lib.of(text, rounds)
    name, _, size = program.partition(":")
    return {
        "name": f"jax_privacy_mb{size}" if name == "jax_privacy" else name,
        "sequences_at_once": int(size),
        "cycles_per_sequence": cycles.corrected / SEQUENCES,
        "cycles_per_sequence_raw": cycles.raw / SEQUENCES,
        "hbm_bytes": held(memory),
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def compare(rows: list[dict]) -> None:
    """Adds ratios to the fastest non-private program with the same sharding."""
    for ending in {_ending(row["name"]) for row in rows}:
        group = [row for row in rows if _ending(row["name"]) == ending]
        bases = [row for row in group if row["name"].startswith("non_private")]
        if not bases:
            continue
        for ratio, key in (("time_ratio", "cycles_per_sequence"), ("time_ratio_raw", "cycles_per_sequence_raw")):
            best = min(row[key] for row in bases)
            for row in group:
                row[ratio] = row[key] / best
        fastest = min(bases, key=lambda row: row["cycles_per_sequence"])
        for row in group:
            row["memory_ratio"] = row["hbm_bytes"] / fastest["hbm_bytes"]


def _ending(name: str) -> str:
    """How a program's parameters are spread: nothing, _sharded, or _model and a number of chips."""
    match = _OVER_MODEL.fullmatch(name)
    return f"_model{match[2]}" if match else "_sharded" if name.endswith("_sharded") else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vaultgemma_1b")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument(
        "--programs",
        nargs="*",
        default=[*REPLICATED, *PEERS, *SHARDED],
        help="NAME:SEQUENCES_AT_ONCE, some of the default; NAME_model8:2 spreads every layer over 8 chips",
    )
    parser.add_argument(
        "--as_training", action="store_true", help="with the options that training gives the compiler, not its own"
    )
    parser.add_argument("--keep", help="folder for the optimised programs' texts")
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    check_for_libtpu("clipping_tpu")
    options = COMPILER_OPTIONS["tpu"] if arguments.as_training else None
    compiler, rows = Compiler(arguments.model, arguments.sequence_length, options), []
    for program in arguments.programs:
        rows.append(row := measure(compiler, program, arguments.keep))
        mega, raw = row["cycles_per_sequence"] / 1e6, row["cycles_per_sequence_raw"] / 1e6
        cycles = f"{mega:.1f} ({raw:.1f} raw) Mcycles a sequence"
        print(
            f"{program:24s} {cycles}, {row['hbm_bytes'] / 2**30:.2f} GiB, compiled in {row['compile_seconds']:.0f} s",
            file=sys.stderr,
        )
    compare(rows)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "jax-privacy")}
    content = {
        "model": arguments.model,
        "sequence_length": arguments.sequence_length,
        "rows": rows,
        "baseline": "non_private at its best number of sequences at once, by cycles with zero-fills corrected; _raw"
        " without correction",
        "compiler_options": options,
        "versions": versions,
        "hardware": "TPU v6e, compiler estimates on a host without one; sharded: parameters over 16 chips",
    }
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
