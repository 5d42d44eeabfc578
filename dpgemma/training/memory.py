"""What a step needs of a device's memory, as far as it follows from shapes alone, and the mesh on which it fits.

Nothing is compiled for it and no array is made, so that a run which cannot fit is refused at once. The compiler's own
buffers come on top; what a compiled step needs is compared with the memory before the first one is taken.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from accounting.errors import InputError
from dpgemma.choices import AUTO, EXAMPLE_SCAN, VMAP
from dpgemma.data.batch import Unit
from dpgemma.objectives.protocol import Objective
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.place import Layout
from dpgemma.sharding.rules import MeshShape
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.optimizer import Optimization
from dpgemma.training.settings import Settings
from dpgemma.training.step import state_shardings

# Where Linux says what a container has, in the second and the first version of its interface.
_LIMITS = tuple(pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes"))
# Of a device's memory, what the known arrays may take where the mesh is chosen.
_SHARE = 0.8
_WIDEST_MODEL_AXIS = 64


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Shapes of a run's arrays on a mesh, each with the place where it lies.

    Attributes:
      trainable: the trained parameters at rest.
      moments: the optimizer's state.
      frozen: the other parameters.
      in_use: the trained parameters as the loss takes them.
    """

    trainable: Any
    moments: Any
    frozen: Any
    in_use: Any

    @classmethod
    def of(
        cls, objective: Objective, mesh: Mesh, optimizer: optax.GradientTransformation, frozen_dtype: Any = jnp.bfloat16
    ) -> "Arrays":
        """Those of an objective.

        Args:
          frozen_dtype: assumed type of the frozen parameters, which the file decides in training.

        Raises:
          InputError: an axis of a parameter does not divide among the devices.
        """
        places = Layout(mesh).places(objective.axes(), objective.shapes())
        trained, frozen = objective.shapes()
        trainable = jax.tree.map(lambda leaf, sharding: placed(leaf, sharding, jnp.float32), trained, places.at_rest)
        moments = jax.tree.map(
            placed,
            jax.eval_shape(optimizer.init, trainable),
            state_shardings(optimizer, places.at_rest, mesh).optimizer_state,
        )
        return cls(
            trainable,
            moments,
            jax.tree.map(lambda leaf, sharding: placed(leaf, sharding, frozen_dtype), frozen, places.frozen),
            jax.tree.map(placed, jax.eval_shape(objective.cast, trainable), places.in_use),
        )

    def known_bytes(self, clipping: str, microbatch_size: int) -> dict[str, int]:
        """Bytes that one device holds in a step, by what for.

        Args:
          clipping: a strategy, or "auto", for which gradients of single rows are not counted.
          microbatch_size: rows at once.
        """
        leaves = zip(jax.tree.leaves(self.in_use), jax.tree.leaves(self.trainable), strict=True)
        weights = sum(bytes_on_one_device(leaf) for leaf, at_rest in leaves if _differ(leaf, at_rest))
        formed = microbatch_size if clipping in (EXAMPLE_SCAN, VMAP) else 0
        total = jax.tree.map(lambda leaf: placed(leaf, leaf.sharding, jnp.float32), self.in_use)
        return {
            "trained parameters at rest": bytes_on_one_device(self.trainable),
            "moments": bytes_on_one_device(self.moments),
            "frozen parameters": bytes_on_one_device(self.frozen),
            "weights in use": weights,
            "sum of gradients": bytes_on_one_device(total),
            "gradients of the rows at once": formed * bytes_on_one_device(self.in_use),
        }


def activations(objective: Objective) -> int:
    """Bytes that the loss of one row keeps for its backward pass, parameters not counted.

    The shapes are those that differentiation keeps; a compiler may keep less, by computing some of it again, and needs
    room of its own while it computes.
    """
    trained, frozen = objective.shapes()
    in_use = jax.eval_shape(objective.cast, trained)
    rows = {name: jax.ShapeDtypeStruct((1, *column.shape), column.dtype) for name, column in objective.spec.items()}

    def kept(trained: Any, frozen: Any, rows: Any) -> Any:
        unit = Unit(rows, jnp.ones(1, bool))
        _, backward = jax.vjp(lambda parameters: objective.loss(parameters, frozen, unit), trained)
        return backward

    def size(tree: Any) -> int:
        return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    return max(0, size(jax.eval_shape(kept, in_use, frozen, rows)) - size((in_use, frozen)))


def _differ(leaf: Any, other: Any) -> bool:
    """Whether a device holds an array of its own for each of two placed shapes."""
    shards = [each.sharding.shard_shape(each.shape) for each in (leaf, other)]
    return bool(leaf.dtype != other.dtype or shards[0] != shards[1])


def placed(leaf: Any, sharding: Any, dtype: Any = None) -> Any:
    """The shape of an array that lies somewhere, of another type if one is given."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def bytes_on_one_device(arrays: Any) -> int:
    """Bytes of a tree of placed shapes that one device holds."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(arrays)
    )


def of_this_computer(limits: Sequence[pathlib.Path] = _LIMITS) -> float | None:
    """Bytes of its memory, or those that a container leaves this process; None where the system does not say.

    Args:
      limits: files in which Linux says how much a container has.
    """
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for path in limits:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            known.append(int(path.read_text()))
    return min(known, default=None)


# Of a process of `train` with the smallest model, on x86 with Linux.
PROCESS_BYTES = 850 * 2**20


def held(analysis: Any) -> int:
    """Bytes of a device that a compiled program needs.

    Args:
      analysis: as compiled.memory_analysis() gives it.
    """
    return int(
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def in_a_save(arrays: Arrays) -> int:
    """Bytes of a device's state while a CPU writes a checkpoint: all of it twice, and its largest array once more."""
    sizes = [bytes_on_one_device(array) for array in jax.tree.leaves((arrays.trainable, arrays.moments))]
    return 2 * sum(sizes) + max(sizes)


def of_checkpoint(arrays: Arrays) -> int:
    """Bytes of a checkpoint's arrays, from all devices."""
    leaves = jax.tree.leaves((arrays.trainable, arrays.moments))
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves)


def of_process(analysis: Any, arrays: Arrays, mesh: Mesh) -> int | None:
    """Bytes that training needs, without the data: of this process on a CPU, of one device elsewhere; None where the
    compiler does not say.
    """
    if analysis is None:
        return None
    if mesh.devices.flat[0].platform != "cpu":
        return held(analysis)
    return devices_here(mesh) * max(held(analysis), in_a_save(arrays)) + PROCESS_BYTES


def devices_here(mesh: Mesh) -> int:
    """Devices of a mesh that share this process's memory; one elsewhere than on a CPU."""
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


def limit(mesh: Mesh) -> float | None:
    """Bytes that one device may use; None where it does not say.

    The devices of a CPU share its memory. Assumed: one process on each computer.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform == "cpu":
        local = sum(each.process_index == device.process_index for each in mesh.devices.flat)
        memory = of_this_computer()
        return None if memory is None else memory / local
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else float(limit)


def fitting(known_bytes: Callable[[MeshShape], float], devices: int, slices: int, memory: float) -> MeshShape | None:
    """The mesh with the smallest model axis on which the arrays known from shapes leave a fifth of a device's memory.

    Args:
      known_bytes: of one device on a mesh; it raises InputError where an axis does not divide.
      devices: in all.
      memory: bytes of one device.
    """
    for shape in meshes(devices, slices):
        try:
            if known_bytes(shape) < _SHARE * memory:
                return shape
        except InputError:
            return None
    return None


def meshes(devices: int, slices: int) -> Iterator[MeshShape]:
    """Meshes of so many devices whose model axis lies within a slice and is a power of two, the smallest one first."""
    a_slice, model = devices // slices, 1
    while model <= min(a_slice, _WIDEST_MODEL_AXIS):
        if a_slice % model == 0:
            yield MeshShape(a_slice // model, model, slices)
        model *= 2


def check(needed: int, memory: float, microbatch_size: int) -> None:
    """Refuses a compiled step that does not fit.

    Args:
      needed, memory: bytes that it needs, and that there are.
      microbatch_size: rows at once.

    Raises:
      InputError: it does not fit.
    """
    if needed <= memory:
        return
    raise InputError(
        f"a step needs {needed / 2**30:.2f} GiB of memory, and there are {memory / 2**30:.2f}: in another `workdir`,"
        f" {_smaller(microbatch_size)}"
    )


def _smaller(microbatch_size: int) -> str:
    """What takes less memory."""
    fewer = f"`microbatch_size`={microbatch_size // 2}, " if microbatch_size > 1 else ""
    return f"give {fewer}`remat`=block or a smaller `sequence_length`, or train adapters (`lora_rank`)"


def refuse(asked: str, least: float, memory: float, found: MeshShape | None) -> NoReturn:
    """Refuses a mesh on which a model cannot fit.

    Args:
      asked: the mesh.
      least, memory: bytes that one device needs, and has.
      found: a mesh on which a fifth of the memory is left; None if there is none.
    """
    advice = f"`mesh`={found} would leave room" if found else "use more devices, or adapters (`lora_rank`)"
    raise InputError(
        f"`mesh`={asked} needs at least {least / 2**30:.1f} GiB a device, and there are {memory / 2**30:.1f}: {advice}"
    )


def resolve_mesh(settings: Settings, objective: Objective, memory: float | None = None) -> str:
    """The mesh that settings ask for, on which the model may fit; for "auto" the one with the smallest model axis.

    Args:
      memory: bytes of one device; by default what it says itself.

    Raises:
      InputError: no such mesh, one that does not divide the devices or the model, or one on which it cannot fit.
    """
    resolved = mesh_lib.resolve(settings.mesh)
    shape = mesh_lib.shape(resolved)
    memory = limit(mesh_lib.make(resolved)) if memory is None else memory
    optimizer = optimizer_lib.make(Optimization.of(settings, settings.steps))

    rows = settings.microbatch_size or 1
    # For a token less is kept than the model has; where that much would fit for every token, nothing need be traced.
    most = rows * objective.volume[1] * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(objective.shapes()))
    kept = 0 if memory is None or most < memory / 8 else rows * activations(objective)

    def of_arrays(shape: MeshShape, rows: int) -> int:
        arrays = Arrays.of(objective, mesh_lib.make(str(shape)), optimizer)
        return sum(arrays.known_bytes(settings.clipping, rows).values())

    def known_bytes(shape: MeshShape) -> int:
        # Half of what differentiation keeps: on CPUs compilers need more than that.
        return of_arrays(shape, rows) + kept // (2 * shape.model)

    least = known_bytes(shape)
    if memory is None or least < _SHARE * memory:
        return resolved
    found = fitting(known_bytes, shape.devices, shape.slices, memory)
    if settings.mesh == AUTO and found is not None:
        return str(found)
    if least > memory > of_arrays(shape, 1) and found is None:
        unit, number = objective.volume
        raise InputError(
            f"{rows} rows at once of {number} {unit} need at least {least / 2**30:.1f} GiB a device,"
            f" and there are {memory / 2**30:.1f}: {_smaller(rows)}"
        )
    if least > memory:
        refuse(resolved, least, memory, found)
    return resolved
