"""The devices of a run."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from accounting.errors import InputError
from dpgemma.sharding.rules import DATA_AXIS, wanted


def resolve(mesh: str) -> str:
    """ "auto" as "data:N" with every device of this process.

    Raises:
      InputError: not of the form data:N, more devices than there are, or several where nothing is compiled.
    """
    count, available = wanted(mesh), jax.device_count()
    if jax.config.values["jax_disable_jit"] and (count or available) > 1:
        raise InputError("several devices need compiled programs: use `mesh`=data:1, or drop JAX_DISABLE_JIT")
    if count is None:
        return f"{DATA_AXIS}:{available}"
    if count > available:
        raise InputError(
            f"`mesh`={mesh} asks for {count} devices, but there are {available}: lower it, or use `mesh`=auto"
        )
    return mesh


def num_devices(mesh: str) -> int:
    """N of a resolved mesh."""
    count = wanted(mesh)
    assert count is not None, "the mesh is not resolved"
    return count


def make(mesh: str) -> Mesh:
    """The mesh of a resolved "data:N"."""
    devices = jax.devices()[: num_devices(mesh)]
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))
