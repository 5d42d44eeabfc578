"""Which way of clipping a run takes: what fits in memory and was the fastest on rows of noise.

No data are looked at: the trial knows the model, the shapes and the devices, so what it chooses is public.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma import user_cache
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.config import GemmaConfig
from dpgemma.objectives import causal as loss_lib
from dpgemma.privacy import clipping
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training import progress
from dpgemma.training.settings import AUTO, TrainConfig
from dpgemma.training.step import sharded_clipped_sum

# The ways that compute the same sum, with units at a time; the smaller of two that are equally fast comes first.
CANDIDATES = (
    (clipping.EXAMPLE_SCAN, 1),
    (clipping.EXAMPLE_SCAN, 2),
    (clipping.EXAMPLE_SCAN, 4),
    (clipping.GHOST, 1),
    (clipping.GHOST, 4),
)
# Below this many floating-point operations on a CPU, a run takes minutes: trials would take longer than they could
# save.
WORTH_A_TRIAL = 3e14
_REPETITIONS = 2
# Share of a device's memory that parameters, optimizer and one microbatch may take.
_MEMORY_SHARE = 0.9
_PACKAGES = ("jax", "jaxlib", "flax", "dpgemma")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way and what it took: seconds per unit and device, and bytes of temporary memory; or why it cannot
    be taken."""

    strategy: str
    microbatch_size: int
    seconds: float | None = None
    temporary_bytes: int | None = None
    refused: str | None = None

    def __str__(self) -> str:
        taken = self.refused or f"{self.seconds * 1e3:.3g} ms a unit, {self.temporary_bytes / 2**20:.0f} MiB"
        return f"{self.strategy} by {self.microbatch_size}: {taken}"


def options(config: TrainConfig) -> dict:
    """The arguments of clipping.clipped_sum that a resolved configuration stands for."""
    return dict(
        strategy=config.clipping,
        microbatch_size=config.microbatch_size,
        scaling=config.clip_scaling,
        thresholds=config.clip_thresholds,
    )


def as_before(config: TrainConfig, recorded: dict) -> tuple[TrainConfig, None]:
    """What an earlier start of the same run chose, where this command leaves it open."""
    clipping_before = recorded.get("clipping") if config.clipping == AUTO else config.clipping
    size = recorded.get("microbatch_size") if config.microbatch_size is None else config.microbatch_size
    return dataclasses.replace(config, clipping=clipping_before, microbatch_size=size), None


def resolve(config: TrainConfig, model: GemmaConfig, bos: int) -> tuple[TrainConfig, str | None]:
    """The configuration with clipping and microbatch_size filled in, and one line that says what was chosen and why.

    Args:
      config: with the mesh resolved.
      bos: number of the token that rows begin after.
    """
    if config.clipping != AUTO:
        return dataclasses.replace(config, microbatch_size=config.microbatch_size or 1), None
    ways = [way for way in CANDIDATES if config.microbatch_size in (None, way[1])] or [
        (clipping.EXAMPLE_SCAN, config.microbatch_size)
    ]
    operations = 6.0 * decoder.num_parameters(model) * config.sequence_length * config.batch_size * config.steps
    if jax.default_backend() == "cpu" and operations < WORTH_A_TRIAL:
        return _chosen(config, *ways[0], "the run is too short for a trial to pay")
    if len(ways) == 1:
        return _chosen(config, *ways[0], "the only way with this `microbatch_size`")
    key = _key(config, model)
    cached = _read_cache().get(key, {})
    if tuple(cached.get("way", ())) in ways:
        return _chosen(config, *cached["way"], f"as in an earlier trial: {cached.get('why')}")
    trials = measure(config, model, bos, ways)
    possible = [trial for trial in trials if trial.refused is None]
    if not possible:
        return _chosen(config, *ways[0], "nothing seems to fit in memory: " + "; ".join(map(str, trials)))
    best = min(possible, key=lambda trial: trial.seconds)
    why = "; ".join(map(str, trials))
    _write_cache(key, {"way": [best.strategy, best.microbatch_size], "why": why})
    return _chosen(config, best.strategy, best.microbatch_size, why)


def _chosen(config: TrainConfig, strategy: str, size: int, why: str) -> tuple[TrainConfig, str]:
    chosen = dataclasses.replace(config, clipping=strategy, microbatch_size=size)
    return chosen, f"`clipping`={strategy} `microbatch_size`={size} ({why})"


def measure(config: TrainConfig, model: GemmaConfig, bos: int, ways) -> list[Trial]:
    """Compiles and times the clipped sum of a few rows of random tokens in every way that fits."""
    mesh = mesh_lib.make(config.mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loss = loss_lib.row_loss(
        model, bos=bos, dtype=jnp.dtype(config.dtype), remat=config.remat, attention=config.attention
    )
    shapes = lora.split(model, decoder.parameter_shapes(model))
    # Trained parameters are float32; frozen ones are as their file has them, most often bfloat16.
    trainable, frozen = (
        jax.tree.map(lambda leaf, dtype=dtype: jnp.full(leaf.shape, 0.01, dtype, device=replicated), tree)
        for tree, dtype in zip(shapes, (jnp.float32, jnp.bfloat16), strict=True)
    )
    units = max(size for _, size in ways) * mesh.size
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (units, config.sequence_length)).astype(np.int32)
    batch = {"tokens": tokens, "scored": np.ones(tokens.shape, bool)}
    limit = memory_limit(mesh)
    return [_trial(way, loss, trainable, frozen, batch, mesh, limit) for way in ways]


def _trial(way, *problem) -> Trial:
    try:
        return _timed(way, *problem)
    except jax.errors.JaxRuntimeError as error:  # an accelerator without enough memory says so here
        return Trial(*way, refused=str(error).splitlines()[0][:100])


def _timed(way, loss, trainable, frozen, batch, mesh, limit: float | None) -> Trial:
    strategy, size = way
    run = jax.jit(
        lambda trainable, frozen, batch, mask: sharded_clipped_sum(
            loss, trainable, frozen, batch, mask, 1.0, mesh, strategy=strategy, microbatch_size=size
        )
    )
    mask = np.ones(len(batch["tokens"]), bool)
    compiled = run.lower(trainable, frozen, batch, mask).compile()
    memory = compiled.memory_analysis()
    # Beside what the program holds, there are the sum, its noised copy and the optimizer's two numbers for each trained
    # parameter.
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + 4 * 4 * decoder.count(trainable)
    if limit is not None and needed > _MEMORY_SHARE * limit:
        refused = f"needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}"
        return Trial(strategy, size, temporary_bytes=memory.temp_size_in_bytes, refused=refused)
    seconds = []
    for _ in range(_REPETITIONS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(trainable, frozen, batch, mask))
        seconds.append((time.perf_counter() - start) / (len(mask) / mesh.size))
    return Trial(strategy, size, min(seconds[1:]), memory.temp_size_in_bytes)


def memory_limit(mesh) -> float | None:
    """Bytes that one device may use; None where it does not say."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size if hasattr(os, "sysconf") else None
    return (device.memory_stats() or {}).get("bytes_limit")


def _key(config: TrainConfig, model: GemmaConfig) -> str:
    facts = {
        "model": dataclasses.asdict(model),
        "settings": [
            config.sequence_length,
            config.dtype,
            config.remat,
            config.attention,
            config.mesh,
            config.microbatch_size,
        ],
        "devices": [jax.devices()[0].device_kind, jax.device_count(), os.cpu_count()],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _cache_file() -> pathlib.Path:
    return user_cache.folder() / "clipping.json"


def _read_cache() -> dict:
    return {key: entry for key, entry in user_cache.read(_cache_file()).items() if isinstance(entry, dict)}


def _write_cache(key: str, entry: dict) -> None:
    """Adds one entry; a folder that cannot be written costs another trial, not the run."""
    try:
        user_cache.write(_cache_file(), _read_cache() | {key: entry})
    except OSError as error:
        progress.warn(f"the trial's result is not kept: {error}")
