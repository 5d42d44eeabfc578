"""The devices of a run."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from accounting.errors import InputError
from dpgemma.sharding.rules import DATA_AXIS, wanted


def resolve(mesh: str) -> str:
    """ "auto" as "data:N" with every device of this process.

    Raises:
      InputError: not of the form data:N, or more devices than there are.
    """
    count, available = wanted(mesh), jax.device_count()
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
