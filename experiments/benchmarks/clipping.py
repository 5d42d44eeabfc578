"""Per-example clipping against ordinary training: our strategies, jax_privacy's clipped_grad and Opacus, on the same
machine.

Every row takes one batch of the same random tokens and leaves the (clipped) sum of gradients in float32. Every program
is first tried at several microbatch sizes; the best of each then run in turn, round after round, and medians of the
rounds' ratios are reported against the non-private step at its own best microbatch. On a CPU each JAX program runs on
one device per core, as the trainer does. Memory is XLA's temporary memory where one device takes the whole batch, with
activations recomputed (--remat) on both sides, against the non-private step that takes it all at once; that of torch,
which has no such analysis, is how far a step raises the resident memory of a process of its own. Prints a table to
standard error and one JSON object.

    # 30M parameters on a CPU, with Opacus
    python -m experiments.benchmarks.clipping
    # 1B parameters on a GPU
    python -m experiments.benchmarks.clipping --model=vaultgemma_1b --sequence_length=1024 --dtype=bfloat16 \\
        --step_remat=block --no-torch
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from accounting.mechanism import Clip
from dpgemma.choices import DTYPES, STRATEGIES
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.objectives.causal import token_losses
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.rules import DATA_AXIS
from dpgemma.training import clipping_choice
from dpgemma.training.step import sharded_clipped_sum
from experiments.benchmarks import peers
from experiments.benchmarks.objectives import causal, of_row
from experiments.hardware import machines, operations

jax_privacy = peers.imported("jax_privacy.clipping")

BENCHMARK = "30m"
OURS = STRATEGIES


class Programs:
    """The JAX programs: each is program(parameters, batch) -> sum of gradients, for a batch spread over the mesh."""

    def __init__(self, arguments, mesh: str):
        # The float32 model of forward_backward for a CPU; a preset for the rest.
        from experiments.benchmarks.forward_backward import MODEL

        self.model = MODEL if arguments.model == BENCHMARK else PRESETS[arguments.model]
        self.batch_size, self.length, self.dtype = (
            arguments.batch,
            arguments.sequence_length,
            jnp.dtype(arguments.dtype),
        )
        self.mesh = mesh_lib.make(mesh)
        tokens = (
            np.random.default_rng(0).integers(4, self.model.vocab_size, (self.batch_size, self.length)).astype(np.int32)
        )
        self.batch = {"tokens": tokens, "scored": np.ones(tokens.shape, bool)}

    @functools.cached_property
    def parameters(self):
        replicated = jax.sharding.NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(functools.partial(decoder.init_parameters, self.model), out_shardings=replicated)(
            jax.random.key(0)
        )

    def make(self, name: str, size: int, remat: str):
        """A program, by a row's name and how many sequences of a device are computed at once."""
        options = dict(bos=2, dtype=self.dtype, remat=remat)
        objective = causal(self.model, self.length, self.dtype, remat)
        if name in OURS:
            way, clip, mask = Strategy(name, size), Clip(1.0), jnp.ones(self.batch_size, bool)

            def ours(params, rows):
                units = Batch.of_rows(rows, mask)
                return sharded_clipped_sum(objective.loss, params, {}, units, clip, way, self.mesh).total

            return ours

        def non_private(params, rows):
            losses = token_losses(self.model, params, rows, **options)
            return (losses.sum(axis=1) / rows["scored"].sum(axis=1)).sum()

        def accumulated(params, rows):
            parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
            if len(parts["tokens"]) == 1:
                return jax.grad(non_private)(params, rows)

            def add(total, part):
                return (jax.tree.map(jnp.add, total, jax.grad(non_private)(params, part)), None)

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

        def jax_privacy_sum(params, rows):
            clip = jax_privacy.clipping.clipped_grad(
                of_row(objective),
                l2_clip_norm=1.0,
                batch_argnums=1,
                keep_batch_dim=False,
                microbatch_size=size,
            )
            return clip(params, rows)

        local = {"non_private": accumulated, "jax_privacy": jax_privacy_sum}[name]
        specs = (PartitionSpec(), PartitionSpec(DATA_AXIS))

        @functools.partial(jax.shard_map, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        def on_each_device(params, rows):
            return jax.lax.psum(local(params, rows), DATA_AXIS)

        return on_each_device

    def compile(self, name: str, size: int, remat: str):
        return jax.jit(self.make(name, size, remat)).lower(self.parameters, self.batch).compile()

    @functools.cached_property
    def operations(self) -> int:
        """Of the products of one ordinary step that recomputes nothing, as many as a model must execute."""
        traced = jax.jit(self.make("non_private", 1, "none")).trace(self.parameters, self.batch)
        return operations.of_products(traced.jaxpr.jaxpr) * self.mesh.size

    def step(self, name: str, size: int, remat: str):
        """The compiled program as a function without arguments; None where it does not fit in memory."""
        try:
            compiled = self.compile(name, size, remat)

            def run():
                return jax.block_until_ready(compiled(self.parameters, self.batch))

            run()
            return run
        except jax.errors.JaxRuntimeError as error:
            print(f"{name} by {size}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            return None

    def temporary_bytes(self, name: str, size: int, remat: str) -> int:
        return self.compile(name, size, remat).memory_analysis().temp_size_in_bytes

    def auto(self, remat: str) -> tuple[str, int]:
        """What --clipping=auto takes for this model on these devices."""
        objective = causal(self.model, self.length, self.dtype, remat)
        per_device = self.batch_size // self.mesh.size
        ways = [way for way in clipping_choice.CANDIDATES if per_device % way[1] == 0]
        trials = clipping_choice.measure(objective, mesh_lib.resolve("auto"), ways)
        print("\n".join(f"trial: {trial}" for trial in trials), file=sys.stderr)
        best = min((t for t in trials if t.refused is None), key=lambda trial: trial.seconds)
        return best.strategy, best.microbatch_size


def timed(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def torch_steps(programs: Programs) -> dict:
    peers.imported("opacus")
    from experiments.benchmarks import torch_peer

    tokens = torch_peer.tokens_of(with_start(programs.batch["tokens"]))
    makers = torch_peer.steps(programs.model, programs.length, programs.batch_size)
    return {name: functools.partial(make(), tokens) for name, make in makers.items()}


def with_start(tokens):
    """Inputs and targets in one array, for models that shift by themselves."""
    return np.concatenate([np.full((len(tokens), 1), 2, tokens.dtype), tokens], axis=1)


def torch_memory(name: str, arguments) -> int | None:
    """Peak memory of one torch step, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, f"--torch_memory_of={name}", f"--batch={arguments.batch}"]
    done = subprocess.run(
        [*command, f"--sequence_length={arguments.sequence_length}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def sizes_of(name: str, per_device: int) -> list[int]:
    """Microbatch sizes that are tried; those that hold many gradients are tried at few."""
    powers = [2**i for i in range(per_device.bit_length()) if per_device % 2**i == 0]
    if name == "vmap":
        return [per_device]
    return powers if name == "non_private" else powers[:3]


def memory_of(arguments, sizes: dict, names: list[str]) -> tuple[dict, int]:
    """Temporary bytes of every row, and of the non-private step at the full batch; see the module."""
    alone = Programs(arguments, "data:1")

    def bytes_of(name, size):
        return alone.temporary_bytes(name, size, arguments.remat)

    memory = {name: bytes_of(*size) if name == "auto" else bytes_of(name, size) for name, size in sizes.items()}
    memory |= {name: torch_memory(name, arguments) for name in names if name.startswith(("opacus", "torch"))}
    return memory, bytes_of("non_private", arguments.batch)


def measure(arguments) -> dict:
    programs = Programs(arguments, mesh_lib.resolve("auto"))
    per_device, remat = programs.batch_size // programs.mesh.size, arguments.step_remat
    best, steps, tried = {}, {}, []
    for name in ("non_private", *OURS, "jax_privacy"):
        for size in sizes_of(name, per_device):
            step = programs.step(name, size, remat)
            if step is None:
                continue
            seconds = timed(step)
            tried.append({"name": name, "microbatch_size": size, "seconds": seconds})
            print(f"{name} by {size}: {seconds:.3g} s", file=sys.stderr)
            if name not in best or seconds < best[name][1]:
                best[name], steps[name] = (size, seconds), step
    chosen = programs.auto(remat)
    steps["auto"] = programs.step(*chosen, remat)
    if arguments.torch:
        steps |= torch_steps(programs)
    rounds = []
    for number in range(arguments.rounds + 1):
        order = list(steps) if number % 2 else list(reversed(steps))
        taken = {name: timed(steps[name]) for name in order}
        if number:  # the first warms up
            rounds.append(taken)
    memory, full_batch = memory_of(
        arguments, {name: size for name, (size, _) in best.items()} | {"auto": chosen}, list(steps)
    )

    def ratio(name, base):
        return statistics.median(taken[name] / taken[base] for taken in rounds)

    rows = []
    for name in steps:
        size = chosen[1] if name == "auto" else best.get(name, (programs.batch_size,))[0]
        row = {"name": f"jax_privacy_mb{size}" if name == "jax_privacy" else name, "microbatch_size": size}
        row |= {"time_ratio": ratio(name, "non_private"), "seconds": statistics.median(taken[name] for taken in rounds)}
        row |= {
            "memory_ratio": memory[name] / full_batch if memory.get(name) else None,
            "temporary_bytes": memory.get(name),
        }
        rows.append(row)
    peers = [name for name in steps if name.startswith(("jax_privacy", "opacus"))]
    tokens = programs.batch_size * programs.length
    result = {
        "rows": rows,
        "auto": {"strategy": chosen[0], "microbatch_size": chosen[1]},
        "auto_against": {name: ratio("auto", name) for name in ("non_private", *peers)},
        "baseline": f"non_private by {best['non_private'][0]}; memory: all of the batch at once on one device,"
        f" remat={arguments.remat}",
        "full_batch_temporary_bytes": full_batch,
        "tried": tried,
        "parameters": decoder.num_parameters(programs.model),
        "batch": programs.batch_size,
        "sequence_length": programs.length,
        "dtype": programs.dtype.name,
        "rounds": len(rounds),
    }
    if jax.default_backend() != "cpu":  # absolute times of a shared CPU say nothing
        result["tokens_per_second"] = {row["name"]: tokens / row["seconds"] for row in rows}
        result["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # of all programs
        chip = machines.of_device(jax.devices()[0].device_kind)
        if chip is not None:  # model FLOP utilisation, as Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) have it
            peak = chip.flops * programs.mesh.size
            result["utilisation"] = {row["name"]: programs.operations / row["seconds"] / peak for row in rows}
    else:
        for row in (*rows, *tried):
            row.pop("seconds")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BENCHMARK, help=f"{BENCHMARK}, or a preset")
    parser.add_argument("--batch", type=int, default=16, help="sequences in all")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--step_remat", default="none", choices=decoder.REMAT_POLICIES, help="what the timed programs recompute"
    )
    parser.add_argument(
        "--remat",
        default="block",
        choices=decoder.REMAT_POLICIES,
        help="what the programs whose memory counts recompute",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--torch", action=argparse.BooleanOptionalAction, default=True, help="compare with torch and Opacus too"
    )
    parser.add_argument("--torch_memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    if arguments.torch_memory_of:
        peers.imported("opacus")
        from experiments.benchmarks import torch_peer
        from experiments.benchmarks.forward_backward import MODEL

        tokens = np.random.default_rng(0).integers(
            4, MODEL.vocab_size, (arguments.batch, arguments.sequence_length + 1)
        )
        make = torch_peer.steps(MODEL, arguments.sequence_length, arguments.batch)[arguments.torch_memory_of]
        print(json.dumps(torch_peer.peak_bytes(make(), torch_peer.tokens_of(tokens))))
        return
    result = measure(arguments)
    for row in result["rows"]:
        memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        print(
            f"{row['name']:20s} by {row['microbatch_size']:<3d} time {row['time_ratio']:.3f}  memory {memory}",
            file=sys.stderr,
        )
    packages = ("jax", "jaxlib", "jax-privacy", *(("torch", "opacus") if arguments.torch else ()))
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result["hardware"] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": cores,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
