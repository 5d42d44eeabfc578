"""The devices of a run."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from accounting.errors import InputError
from dpgemma.sharding.rules import DATA_AXIS, MODEL_AXIS, MeshShape, wanted


def resolve(mesh: str) -> str:
    """ "auto" as "data:N" with every device of this process.

    Raises:
      InputError: not a mesh, more devices than there are, or several where nothing is compiled.
    """
    given, available = wanted(mesh), jax.device_count()
    if jax.config.values["jax_disable_jit"] and (given.devices if given else available) > 1:
        raise InputError("several devices need compiled programs: use `mesh`=data:1, or drop JAX_DISABLE_JIT")
    if given is None:
        return str(MeshShape(available))
    if given.devices > available:
        raise InputError(
            f"`mesh`={mesh} asks for {given.devices} devices, but there are {available}: lower it, or use `mesh`=auto"
        )
    return str(given)


def shape(mesh: str) -> MeshShape:
    """That of a resolved mesh."""
    found = wanted(mesh)
    assert found is not None, "the mesh is not resolved"
    return found


def make(mesh: str) -> Mesh:
    """The devices of a resolved mesh. Without a second axis, or with one of a single device, it has one axis."""
    wanted_shape = shape(mesh)
    devices = np.array(jax.devices()[: wanted_shape.devices])
    if wanted_shape.model == 1:
        return Mesh(devices, (DATA_AXIS,), axis_types=(AxisType.Auto,))
    grid = devices.reshape(wanted_shape.data, wanted_shape.model)
    return Mesh(grid, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))
