"""How long a run may take, before it begins: its operations, by what this machine does in a second."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from accounting.mechanism import Mechanism
from dpgemma.objectives.protocol import Objective

_SIZE, _SECONDS = 512, 0.1
# A step takes so much longer than a product of matrices of as many operations: a choice between what runs of three
# models took on two cores, 2.1 times (tiny), 4.6 (850,000 parameters) and 2.1 (270 million).
_OVERHEAD = 2.5


def expected_seconds(objective: Objective, mechanism: Mechanism, mesh: Mesh) -> float:
    """A rough guess: a product of matrices is timed, and all devices are taken to be as fast."""
    rows = mechanism.expected_batch_size * mechanism.steps
    # The devices of a CPU share its cores, all of which the timed product takes.
    devices = 1 if mesh.devices.flat[0].platform == "cpu" else mesh.devices.size
    operations = objective.operations_per_row * rows / devices
    return _OVERHEAD * operations / _operations_a_second()


def _operations_a_second() -> float:
    product = jax.jit(lambda x: x @ x)
    x = jnp.full((_SIZE, _SIZE), 1 / _SIZE)
    product(x).block_until_ready()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        x = product(x)
        x.block_until_ready()
        count += 1
    return count * 2 * _SIZE**3 / (time.perf_counter() - start)


def in_words(seconds: float) -> str:
    """
    >>> in_words(40), in_words(100), in_words(8000), in_words(300000)
    ('40 seconds', '2 minutes', '2.2 hours', '3.5 days')
    """
    for unit, size, digits in (("days", 86400, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} seconds"
