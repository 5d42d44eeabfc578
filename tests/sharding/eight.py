"""What tests of meshes run in a process with eight devices, because their number is fixed once in a process."""

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

from accounting.mechanism import dp_sgd
from dpgemma.data.batch import Batch
from dpgemma.gemma.files import weights
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.place import Layout
from dpgemma.training.step import TrainState, make_train_step, state_shardings
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


class Step:
    """A step of AdamW on a small decoder, its state spread over so many devices, or held whole by each."""

    def __init__(self, devices, *, spread=True, grid_bits=20, dtype="float32"):
        self.params, rows = step_test.problem()
        self.mesh, optimizer = mesh_lib.make(f"data:{devices}"), optax.adamw(1e-2)
        axes = weights.axes(step_test.MODEL)
        at_rest = Layout().shardings_at_rest(self.mesh, axes, self.params) if spread else None
        mechanism = dp_sgd(100, 12, 16, 0.8, 0.5, 10, grid_bits=grid_bits)
        loss = objectives.causal(step_test.MODEL, bos=2, dtype=dtype).loss
        self.step = make_train_step(loss, optimizer, mechanism, self.mesh, at_rest=at_rest)
        self.state = TrainState(jax.tree.map(jnp.array, self.params), optimizer.init(self.params))
        if spread:
            places = state_shardings(optimizer, at_rest, self.mesh)
            self.state = jax.device_put(self.state, TrainState(places.parameters, places.optimizer_state))
        twice = {name: np.concatenate([column, column]) for name, column in rows.items()}
        self.batch = Batch.of_rows(twice, np.arange(16) < 13).dealt(devices)

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
