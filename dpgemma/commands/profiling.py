"""A trace of a few steps, for TensorBoard or Perfetto: which operations took how long."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import jax

from dpgemma.training.observers import Private, Released, Silent


class Profile(Silent):
    """An observer that records steps, from the second one of this process on: the first compiles.

    How long a step takes depends on how many units it has, so a trace is private.

    Attributes:
      folder: where the trace goes; known once the run is.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen, self._is_recording = 0, False
        self.folder: pathlib.Path | None = None

    def step(self, released: Released, private: Private) -> None:
        self._seen += 1
        if self._seen == 1 and self.folder is not None:
            with _warned():
                jax.profiler.start_trace(self.folder)
                self._is_recording = True
        elif self._seen == 1 + self._steps:
            self.end()

    def end(self) -> None:
        if self._is_recording:
            self._is_recording = False
            with _warned():
                jax.profiler.stop_trace()


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """A trace that cannot be written costs a warning, not the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        print(f"warning: the trace cannot be written ({str(error)[:150]})", file=sys.stderr, flush=True)
