"""The devices of a run."""

import contextlib
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from accounting.errors import InputError

DATA_AXIS = "data"
_MOST_CPU_DEVICES = 8
_MOST_DEVICES = 10**6  # what jax can be asked for at all


def resolve(mesh: str) -> str:
    """ "auto" as "data:N" with every device; a CPU is split into one device per core first. Call before any other use
    of JAX.

    Raises:
      InputError: not of the form data:N, or more devices than there are.
    """
    axis, _, count = mesh.partition(":")
    if mesh != "auto" and (axis != DATA_AXIS or not count.isdecimal() or not 0 < int(count) < _MOST_DEVICES):
        raise InputError(f"`mesh` must be auto or data:N with N devices, got {mesh!r}")
    cores = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES) if hasattr(os, "sched_getaffinity") else 1
    with contextlib.suppress(RuntimeError):  # takes effect on the CPU alone, and only before its first use
        jax.config.update("jax_num_cpu_devices", cores if mesh == "auto" else int(count))
    available = jax.device_count()
    if mesh == "auto":
        return f"{DATA_AXIS}:{available}"
    if int(count) > available:
        raise InputError(
            f"`mesh`={mesh} asks for {count} devices, but there are {available}: lower it, or use `mesh`=auto"
        )
    return mesh


def make(mesh: str) -> Mesh:
    """The mesh of a resolved "data:N"."""
    devices = jax.devices()[: int(mesh.partition(":")[2])]
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))
