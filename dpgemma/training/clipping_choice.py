"""Which way of clipping a run takes: what fits in memory and was the fastest on rows of noise.

No data are looked at: the trial knows the model, the shapes and the devices, so what it chooses is public.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from accounting.errors import InputError
from accounting.mechanism import Clip
from dpgemma import user_cache
from dpgemma.choices import AUTO, EXAMPLE_SCAN, GHOST, PER_LAYER, STRATEGIES
from dpgemma.data.batch import Batch
from dpgemma.objectives.protocol import Objective
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place, processes
from dpgemma.sharding.place import Layout
from dpgemma.sharding.rules import FSDP_AXIS, MeshShape
from dpgemma.training import memory
from dpgemma.training.observers import Observer
from dpgemma.training.settings import Settings
from dpgemma.training.step import sharded_clipped_sum

Way = tuple[str, int]

# The ways that compute the same sum, with units at a time; the smaller of two that are equally fast comes first.
CANDIDATES: tuple[Way, ...] = ((EXAMPLE_SCAN, 1), (EXAMPLE_SCAN, 2), (EXAMPLE_SCAN, 4), (GHOST, 1), (GHOST, 4))
# Below this many floating-point operations on a CPU, a run takes minutes: trials would take longer than they could
# save.
WORTH_A_TRIAL = 3e14
_REPETITIONS = 2
# Share of a device's memory that parameters, optimizer and one microbatch may take.
_MEMORY_SHARE = 0.9
# Any grid takes as long: sums are timed as an exact release adds them.
_STEPS = 2.0**20
_PACKAGES = ("jax", "jaxlib", "flax", "dpgemma")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A way of clipping (strategy and microbatch size), with its measured cost or why it was refused.

    Attributes:
      strategy, microbatch_size: the way.
      seconds: per unit and device.
      temporary_bytes: memory that the program needs beside its inputs.
      refused: why the way cannot be taken; None if it can.
    """

    strategy: str
    microbatch_size: int
    seconds: float = math.nan
    temporary_bytes: int = 0
    refused: str | None = None

    def __str__(self) -> str:
        taken = self.refused or f"{self.seconds * 1e3:.3g} ms a unit, {self.temporary_bytes / 2**20:.0f} MiB"
        return f"{self.strategy} by {self.microbatch_size}: {taken}"


def check(clipping: str, remat: str, mesh: MeshShape) -> None:
    """Refuses what a fully sharded mesh is meant to avoid.

    Args:
      clipping: a strategy, or "auto".

    Raises:
      InputError: gradients of whole layers, or gathered layers, would be held.
    """
    if not mesh.fully_sharded:
        return
    if clipping not in (AUTO, GHOST, PER_LAYER):
        raise InputError(
            f"`clipping`={clipping} holds whole gradients, which a mesh with an {FSDP_AXIS} axis has no room for: use"
            f" {GHOST} or {PER_LAYER}, or spread layers by `mesh`=data:A,model:B"
        )
    if remat != "block":
        raise InputError(
            f"`remat`={remat} keeps every gathered layer for the backward pass, which a mesh with an {FSDP_AXIS} axis"
            " has no room for: use `remat`=block"
        )


def as_before(settings: Settings, recorded: Mapping[str, Any]) -> Strategy:
    """Returns the strategy of a resumed run: from the settings, or from its config.json where they leave it open.

    Args:
      recorded: the run's config.json.

    Raises:
      InputError: config.json does not say it.
    """
    name = recorded.get("clipping") if settings.clipping == AUTO else settings.clipping
    size = recorded.get("microbatch_size") if settings.microbatch_size is None else settings.microbatch_size
    if name not in STRATEGIES or not isinstance(size, int) or size < 1:
        raise InputError(
            f"the run's config.json is damaged: it has clipping {name!r} with microbatch_size {size!r}; restore it, or"
            " start another run in a new `workdir`"
        )
    return Strategy(str(name), size, settings.clip_thresholds)


def measure(objective: Objective, mesh: str, ways: Sequence[Way], limit: float | None = None) -> list[Trial]:
    """Compiles and times the clipped sum of a few rows of noise in every way that fits.

    Args:
      limit: bytes of memory of one device; by default what it says itself.
    """
    devices = mesh_lib.make(mesh)
    places = Layout(devices).places(objective.axes(), objective.shapes())
    # Trained parameters are float32; frozen ones are as their file has them, most often bfloat16.
    trainable, frozen = (
        jax.tree.map(functools.partial(_filled, dtype=dtype), tree, shardings)
        for tree, dtype, shardings in zip(
            objective.shapes(), (jnp.float32, jnp.bfloat16), (places.at_rest, places.frozen), strict=True
        )
    )
    units = max(size for _, size in ways) * place.rows(devices)
    batch = Batch.of_rows(objective.noise_rows(units), np.ones(units, bool))
    limit = _least_limit(devices) if limit is None else limit
    return [_trial(way, objective, trainable, frozen, batch, devices, limit) for way in ways]


def _least_limit(devices: Mesh) -> float | None:
    """Of all processes, so that each of them refuses the ways that any of them has to."""
    limits = [limit for limit in processes.from_all(lambda: memory.limit(devices)) if limit is not None]
    return min(limits, default=None)


def _filled(leaf: Any, sharding: Any, dtype: Any) -> jax.Array:
    return jnp.full(leaf.shape, 0.01, dtype, device=sharding)


def _trial(
    way: Way, objective: Objective, trainable: Any, frozen: Any, batch: Batch, mesh: Mesh, limit: float | None
) -> Trial:
    try:
        return _timed(way, objective, trainable, frozen, batch, mesh, limit)
    except jax.errors.JaxRuntimeError as error:  # an accelerator without enough memory says so here
        if processes.count() > 1:
            raise  # others may be in the midst of the program
        return Trial(*way, refused=str(error).splitlines()[0][:100])


def _timed(
    way: Way, objective: Objective, trainable: Any, frozen: Any, batch: Batch, mesh: Mesh, limit: float | None
) -> Trial:
    how, places = Strategy(*way), Layout(mesh).places(objective.axes(), objective.shapes())
    run = jax.jit(
        lambda trainable, frozen, batch: sharded_clipped_sum(
            objective.loss, objective.cast(trainable), frozen, batch, Clip(1.0), how, mesh, steps=_STEPS, places=places
        )
    )
    compiled = run.lower(trainable, frozen, batch).compile()
    analysis: Any = compiled.memory_analysis()
    # Beside what the program holds, there are the sum, its noised copy and the optimizer's two numbers for each trained
    # parameter.
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)) / mesh.size
    needed = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + 4 * 4 * trained
    if limit is not None and needed > _MEMORY_SHARE * limit:
        refused = f"needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}"
        return Trial(*way, temporary_bytes=analysis.temp_size_in_bytes, refused=refused)
    seconds = []
    for _ in range(_REPETITIONS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(trainable, frozen, batch))
        seconds.append((time.perf_counter() - start) / (batch.slots / place.rows(mesh)))
    return Trial(*way, seconds=min(seconds[1:]), temporary_bytes=analysis.temp_size_in_bytes)


def resolve(
    settings: Settings,
    mesh: str,
    objective: Objective,
    observers: Sequence[Observer] = (),
    *,
    measure: Callable[[Objective, str, Sequence[Way]], list[Trial]] = measure,
) -> tuple[Strategy, str | None]:
    """The strategy with microbatch size, and one line that says what was chosen and why (None if nothing was open).

    Args:
      mesh: resolved.
      measure: the trial.
    """
    wanted = settings.microbatch_size
    several = bool(settings.units) and settings.items_per_unit == 1
    if several and settings.clipping in (AUTO, EXAMPLE_SCAN) and wanted not in (None, 1):
        raise InputError(
            f"`clipping`={EXAMPLE_SCAN} takes the rows of a {settings.privacy_unit} one by one: drop `microbatch_size`,"
            f" or give `clipping`={GHOST}, which costs all of its `rows_per_unit` rows"
        )
    if settings.clipping != AUTO:
        return Strategy(settings.clipping, wanted or 1, settings.clip_thresholds), None
    possible = {GHOST} if mesh_lib.shape(mesh).fully_sharded else {EXAMPLE_SCAN, GHOST}
    ways = [way for way in CANDIDATES if way[0] in possible and wanted in (None, way[1])]
    ways = ways or [(min(possible), wanted or 1)]
    if several and EXAMPLE_SCAN in possible:
        return _chosen(settings, (EXAMPLE_SCAN, 1), "units of several rows then cost no more rows than they have")
    operations = objective.operations_per_row * settings.batch_size * settings.steps
    if jax.default_backend() == "cpu" and operations < WORTH_A_TRIAL:
        return _chosen(settings, ways[0], "the run is too short for a trial to pay")
    if len(ways) == 1:
        return _chosen(settings, ways[0], "the only way with this `microbatch_size`")
    key = _key(objective, mesh, wanted)
    cached = processes.from_first(lambda: _read_cache().get(key, {}))
    if tuple(cached.get("way", ())) in ways:
        return _chosen(settings, tuple(cached["way"]), f"as in an earlier trial: {cached.get('why')}")
    told = processes.from_all(lambda: [dataclasses.asdict(trial) for trial in measure(objective, mesh, ways)])
    trials = [_worst([Trial(**trial) for trial in of_way]) for of_way in zip(*told, strict=True)]
    fitting = [trial for trial in trials if trial.refused is None]
    if not fitting:
        return _chosen(settings, ways[0], "nothing seems to fit in memory: " + "; ".join(map(str, trials)))
    best = min(fitting, key=lambda trial: trial.seconds)
    why = "; ".join(map(str, trials))
    if processes.is_first():
        try:
            user_cache.write(
                cache_file(), _read_cache() | {key: {"way": [best.strategy, best.microbatch_size], "why": why}}
            )
        except OSError as error:  # it costs another trial, not the run
            for observer in observers:
                observer.warn(f"the trial's result is not kept: {error}")
    return _chosen(settings, (best.strategy, best.microbatch_size), why)


def _worst(trials: Sequence[Trial]) -> Trial:
    """Of one way in all processes: where it was refused, or else took longest."""
    return max(trials, key=lambda trial: (trial.refused is not None, trial.seconds))


def _chosen(settings: Settings, way: Way, why: str) -> tuple[Strategy, str]:
    name, size = way
    return Strategy(name, size, settings.clip_thresholds), f"`clipping`={name} `microbatch_size`={size} ({why})"


def _key(objective: Objective, mesh: str, microbatch_size: int | None) -> str:
    facts = {
        **objective.identity,
        "mesh": [mesh, microbatch_size],
        "steps": _STEPS,
        "devices": [jax.devices()[0].device_kind, jax.device_count(), os.cpu_count()],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cache_file() -> pathlib.Path:
    """Where the results of trials are kept."""
    return user_cache.folder() / "clipping.json"


def _read_cache() -> dict[str, Any]:
    return {key: entry for key, entry in user_cache.read(cache_file()).items() if isinstance(entry, dict)}
