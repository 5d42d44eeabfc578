"""Trains a run whose releases are recorded, or replaced by those that another run recorded.

    python -m tests.training.replayed RELEASES RUN PROGRAMS FLAGS

RELEASES is a .npz file: written where it is absent, and played back otherwise. PROGRAMS is a folder that every compiled
program's text goes to. Keys and names at random are constants, so nothing of two runs differs by chance.
"""

import pathlib
import re
import secrets
import sys

import jax
import numpy as np
from absl import flags
from jax.experimental import io_callback

from dpgemma.commands import command_flags
from dpgemma.privacy.keys import Keys
from dpgemma.training import step as step_lib
from dpgemma.training.prepare import prepare_with_public_keys
from dpgemma.training.settings import Settings

KEYS = Keys(*(bytes([number]) * 32 for number in range(1, 6)))
# Addresses of callbacks, which differ between processes.
_ADDRESSES = re.compile(r"\b\d{12,}\b")


class Recorded:
    """A noiser that hands on what another run released, and keeps what this one would have released."""

    def __init__(self, noiser, played):
        self._noiser, self._played, self.own = noiser, played, []

    def __getattr__(self, name):
        return getattr(self._noiser, name)

    def add(self, *arguments):
        noised, state = self._noiser.add(*arguments)
        leaves, structure = jax.tree.flatten(noised)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        released = io_callback(self._release, shapes, *leaves, ordered=True)
        return jax.tree.unflatten(structure, released), state

    def _release(self, *leaves):
        self.own.append([np.asarray(leaf) for leaf in leaves])
        return self._played[len(self.own) - 1] if self._played else self.own[-1]


def main():
    releases, run, programs, *given = sys.argv[1:]
    jax.config.update("jax_disable_most_optimizations", True)  # programs with callbacks are not kept for others
    jax.config.update("jax_dump_ir_to", programs)
    jax.config.update("jax_dump_ir_modes", "stablehlo")
    secrets.token_hex = lambda size=32: "0" * 2 * size
    played, noisers = [], []
    if pathlib.Path(releases).exists():
        with np.load(releases) as file:
            steps, leaves = (1 + max(int(name.split("_")[i]) for name in file) for i in (0, 1))
            played = [[file[f"{step}_{leaf}"] for leaf in range(leaves)] for step in range(steps)]
    ordinary = step_lib.noiser_of

    def noiser_of(mechanism):
        noisers.append(Recorded(ordinary(mechanism), played))
        return noisers[-1]

    step_lib.noiser_of = noiser_of
    values = flags.FlagValues()
    command_flags.define_from_dataclass(Settings, values)
    values(["replayed", *given])
    settings = Settings(**{name: values[name].value for name in Settings.__dataclass_fields__})
    trainer = prepare_with_public_keys(settings, KEYS, run)
    trainer.train()
    trainer.run.unlock()
    own = noisers[-1].own
    file = releases if not played else f"{run}.npz"
    np.savez(file, **{f"{step}_{leaf}": x for step, taken in enumerate(own) for leaf, x in enumerate(taken)})
    for path in pathlib.Path(programs).iterdir():
        path.write_text(_ADDRESSES.sub("*", path.read_text(errors="replace")))


if __name__ == "__main__":
    main()
