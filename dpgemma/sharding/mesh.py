"""The devices of a run."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from accounting.errors import InputError
from dpgemma.sharding import processes
from dpgemma.sharding.rules import MeshShape, wanted


def resolve(mesh: str, num_slices: int | None = None) -> str:
    """ "auto" as "data:N" with every device of all processes, or as "slice:S,data:N" where they are those of slices.

    Args:
      num_slices: S, where the devices do not say it themselves.

    Raises:
      InputError: not a mesh, more devices than there are, several where nothing is compiled, or, with several
        processes, fewer devices than they have in all.
    """
    given, available = wanted(mesh), jax.device_count()
    if jax.config.values["jax_disable_jit"] and (given.devices if given else available) > 1:
        raise InputError("several devices need compiled programs: use `mesh`=data:1, or drop JAX_DISABLE_JIT")
    if num_slices is not None and given is not None:
        raise InputError("`num_slices` goes with `mesh`=auto: drop it, or give the slices as slice:S,data:N in `mesh`")
    if num_slices is not None and (num_slices < 1 or available % num_slices):
        raise InputError(f"`num_slices` must divide the {available} devices, got {num_slices}")
    if given is None:
        slices = num_slices or len({getattr(device, "slice_index", 0) for device in jax.devices()})
        return str(MeshShape(available // slices, slices=slices))
    if given.devices > available:
        raise InputError(
            f"`mesh`={mesh} asks for {given.devices} devices, but there are {available}: lower it, or use `mesh`=auto"
        )
    if processes.count() > 1 and given.devices < available:
        raise InputError(f"`mesh`={mesh} has {given.devices} of the {available} devices of all processes: use them all")
    return str(given)


def shape(mesh: str) -> MeshShape:
    """That of a resolved mesh."""
    found = wanted(mesh)
    assert found is not None, "the mesh is not resolved"
    return found


def make(mesh: str) -> Mesh:
    """The devices of a resolved mesh."""
    wanted_shape = shape(mesh)
    return of_devices(jax.devices()[: wanted_shape.devices], wanted_shape)


def of_devices(devices: Sequence[jax.Device], wanted_shape: MeshShape) -> Mesh:
    """The mesh of these devices, slice by slice; of axes beside the data axis, those with more than one device."""
    axes = wanted_shape.sizes
    in_order = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    grid = np.array(in_order).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
