"""What tests of meshes run in a process with eight devices, because their number is fixed once in a process."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from accounting.mechanism import Clip, dp_sgd
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.files import weights
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import ClippedSum, PrivateStats, Strategy
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.noisers import noiser_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place
from dpgemma.sharding.place import Layout
from dpgemma.sharding.rules import MeshShape, wanted
from dpgemma.training.memory import held
from dpgemma.training.step import TrainState, make_train_step, sharded_clipped_sum, state_shardings
from experiments.hardware.step_program import StepProgram
from tests import objectives
from tests.training import step_test

COLLECTIVES = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"


def result_of(call: str) -> object:
    """What `call`, an expression of this module's names, gives there; it has to be JSON."""
    code = f"import json; from tests.sharding.eight import *; print(json.dumps({call}))"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def small(family):
    """A model of a family whose every spread axis divides among eight devices, but for the heads of keys and values."""
    sizes = dict(d_model=16, d_ff=32, num_heads=8, num_kv_heads=2, head_dim=8, vocab_size=256)
    config = dataclasses.replace(PRESETS[family], **sizes)
    kinds = sorted(set(config.layer_types))
    recurrent = dict(lru_width=64) if "recurrent" in kinds else {}
    return dataclasses.replace(config, layer_types=tuple(kinds), window=5, **recurrent)


def way(mesh):
    """Of clipping: a fully sharded mesh has one of its own."""
    return Strategy("ghost" if "fsdp" in mesh else "example_scan")


def places_of(model, mesh):
    """Where the parameters of a model lie, all of them trained."""
    return Layout(mesh).places((weights.axes(model), {}), (decoder.parameter_shapes(model), {}))


def batch(mesh, places=1):
    """Sixteen slots, the last three of them padding; the others have up to `places` rows."""
    _, rows = step_test.problem()
    twice = {name: np.concatenate([column, column]) for name, column in rows.items()}
    several = {name: np.stack([np.roll(column, i, 0) for i in range(places)], 1) for name, column in twice.items()}
    real = np.arange(places) < np.where(np.arange(16) < 13, 1 + np.arange(16) % places, 0)[:, None]
    return Batch(several, real).dealt(mesh_lib.shape(mesh).rows)


class Step:
    """A step of AdamW on a small decoder, its state spread over the mesh, or held whole by each device."""

    def __init__(self, mesh, *, model=step_test.MODEL, spread=True, grid_bits=20, dtype="float32", remat="none"):
        self.mesh, optimizer = mesh_lib.make(mesh), optax.adamw(1e-2)
        self.params = decoder.init_parameters(model, jax.random.key(0))
        places = places_of(model, self.mesh) if spread else None
        mechanism = dp_sgd(100, 12, 16, 0.8, 0.5, 10, grid_bits=grid_bits)
        options = dict(dtype=dtype, remat=remat, vocabulary_is_spread="model" in mesh)
        objective = objectives.causal(model, bos=2, **options)
        self.step = make_train_step(
            objective.loss, optimizer, mechanism, self.mesh, way(mesh), places=places, cast=objective.cast
        )
        self.state = TrainState(jax.tree.map(jnp.array, self.params), optimizer.init(self.params))
        if spread:
            of_state = state_shardings(optimizer, places.at_rest, self.mesh)
            self.state = jax.device_put(self.state, TrainState(of_state.parameters, of_state.optimizer_state))
        self.batch = batch(mesh)

    def text(self):
        return self.step.lower(self.state, {}, self.batch, noise_keys(bytes(32), 0)).compile().as_text()

    def run(self, steps):
        for t in range(steps):
            self.state, _ = self.step(self.state, {}, self.batch, noise_keys(bytes(32), t))
        return self

    def digest(self):
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(self.state.as_dict())]
        return hashlib.sha256(b"".join(leaves)).hexdigest()

    def largest_share(self):
        """The largest part of an array with more than one axis, parameter or moment, that one device holds."""
        leaves = [leaf for leaf in jax.tree.leaves(self.state) if leaf.ndim > 1]
        return max(leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves)


def sums(meshes, family, dtype="float32", strategy="example_scan", rank=None, rows_per_unit=1):
    """Of the first mesh's clipped sum without noise: its norm, and how far those of all meshes are from it; the largest
    difference of a unit's norm; and the largest norm that one unit contributes, in clip norms, on any of them.

    Args:
      rank: of adapters, which then are all that is trained.
      rows_per_unit: most rows of a unit.
    """
    model = small(family)
    if rank:
        model = dataclasses.replace(model, lora=lora.adapters(model, rank, float(rank), "all"))
    params = decoder.init_parameters(model, jax.random.key(0))
    if rank:  # adapters start with products of zero
        params = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    trained, others = lora.split(model, params)
    found = []
    for mesh in meshes:
        devices = mesh_lib.make(mesh)
        objective = objectives.causal(model, bos=2, dtype=dtype, vocabulary_is_spread="model" in mesh)
        places = Layout(devices).places(objective.axes(), objective.shapes())

        @jax.jit
        def run(trained, others, batch, objective=objective, devices=devices, places=places):
            clip, how = Clip(0.05), Strategy(strategy)  # so small that every unit is clipped
            cast = objective.cast(trained)
            return sharded_clipped_sum(objective.loss, cast, others, batch, clip, how, devices, places=places)

        whole = batch(mesh, rows_per_unit)
        here = jax.device_put((trained, others), (places.at_rest, places.frozen))
        clipped = run(*here, whole)
        norms, mask = np.asarray(clipped.stats.norms), np.asarray(whole.mask)
        alone = []
        for slot in np.flatnonzero(mask)[:3]:
            one = dataclasses.replace(whole, real=whole.real & (np.arange(16) == slot)[:, None])
            alone.append(np.linalg.norm(flat(run(*here, one).total)) / 0.05)
        found.append((flat(clipped.total), np.sort(norms[mask]), max(alone)))
    first, first_norms, _ = found[0]
    away = [float(np.linalg.norm(total - first)) for total, _, _ in found]
    norms_away = [float(np.abs(norms / first_norms - 1).max()) for _, norms, _ in found]
    return float(np.linalg.norm(first)), away, norms_away, float(max(alone for _, _, alone in found))


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def noises(meshes, family):
    """SHA-256 of what a step adds to a sum of zeros, by mesh."""
    model, found = small(family), []
    for mesh in meshes:
        devices = mesh_lib.make(mesh)
        places = places_of(model, devices)
        in_shards = functools.partial(place.in_shards, devices, jax.tree.leaves(place.specs(places.at_rest)))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), decoder.parameter_shapes(model))
        nobody = PrivateStats(jnp.zeros(1), jnp.zeros(1))
        noiser = noiser_of(dp_sgd(100, 12, 16, 0.8, 0.5, 10, grid_bits=20))

        @jax.jit
        def run(zeros, noiser=noiser, in_shards=in_shards, nobody=nobody):
            clipped = ClippedSum(zeros, nobody, sensitivity=0.5, steps=noiser.steps(0.8))
            return noiser.add(clipped, (), noise_keys(bytes(32), 0), 0.8, in_shards)[0].total

        noise = flat(run(jax.device_put(zeros, places.at_rest)))
        assert len(np.unique(noise)) > 0.9 * noise.size
        found.append(hashlib.sha256(noise.tobytes()).hexdigest())
    return found


def compiled_bytes(name, settings, rank):
    """Bytes of a step of a preset with two layers at most, by the settings of a recipe, with two devices along every
    axis of its mesh.
    """
    config = PRESETS[name]
    config = dataclasses.replace(config, layer_types=tuple(sorted(set(config.layer_types))))
    if rank:
        config = dataclasses.replace(config, lora=lora.adapters(config, rank, float(rank), "all"))
    shape = wanted(settings["mesh"]) or MeshShape(2)
    small_shape = MeshShape(2, min(shape.model, 2), min(shape.slices, 2))
    mesh = mesh_lib.of_devices(jax.devices()[: small_shape.devices], small_shape)
    how = Strategy(settings["clipping"], settings["microbatch_size"])
    rows = 2 * small_shape.rows * settings["microbatch_size"]
    program = StepProgram(config, mesh, settings["sequence_length"], rows, how, settings["dtype"], settings["remat"])
    return held(program.trace().lower().compile().memory_analysis())


def program_with_transfers():
    """Optimised HLO of a sum inside a loop of three rounds, a gather and a scatter."""
    spec = jax.sharding.PartitionSpec(("slice", "data"))

    def of_one(x):
        total = jax.lax.fori_loop(0, 3, lambda i, total: jax.lax.psum(total * 0.5 + i, "slice"), x)
        whole = jax.lax.all_gather(total, "data", tiled=True)
        return jax.lax.psum_scatter(whole * whole[0], "data", tiled=True)

    run = jax.jit(place.on_each_device(mesh_lib.make("slice:2,data:4"), of_one, (spec,), spec))
    return run.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()


def largest_arrays(text):
    """How many numbers the arrays of an optimised program have, by type, each the largest one."""
    found = {}
    for kind, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text):
        found[kind] = max(found.get(kind, 0), int(np.prod([int(n) for n in shape.split(",")])))
    return found


def collectives(text):
    """(operation, whether it is run by a loop, largest number of numbers in a result) of an optimised program."""
    found, computation, bodies = [], "", set(re.findall(r"body=%?([\w.\-]+)", text))
    called_by = {}
    for line in text.splitlines():
        if match := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = match.group(1)
        for name in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line):
            called_by.setdefault(name, set()).add(computation)
        for name in COLLECTIVES:
            if match := re.search(rf"= (.*?) {name}(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
                sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
                found.append((name, computation, max(sizes)))

    def in_loop(name):
        return name in bodies or any(map(in_loop, called_by.get(name, ())))

    return [(name, in_loop(where), size) for name, where, size in found]
