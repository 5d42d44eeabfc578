"""Arrays on the devices of a mesh: parameters by the rules of a layout, units dealt out over the data axis."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from accounting.errors import InputError
from dpgemma.sharding.rules import (
    AT_REST,
    AXES_OF_ROWS,
    DATA_AXIS,
    FSDP_AXIS,
    FULLY_SHARDED,
    MAY_STAY_WHOLE,
    MODEL_AXIS,
    REPLICATED,
    RULES,
    TENSOR,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters lie on a mesh, by one table of rules: while they are used, and at rest.

    At rest are the parameters that are trained, the moments of the optimizer and the noised sum: these are spread over
    the data axis as well, so that no device holds or updates all of them (Rajbhandari et al. 2020, arXiv 1910.02054).
    With an fsdp axis in its place, parameters are spread in use as they are at rest.

    >>> from jax.sharding import AbstractMesh
    >>> layout = Layout(AbstractMesh((2,), ("data",)))
    >>> tuple(layout.in_use(("layers", "model", "feed_forward"), (26, 64, 256)))  # every device holds all of it
    (None, None, None)
    >>> tuple(layout.at_rest(("layers", "model", "feed_forward"), (26, 64, 256)))
    (None, None, 'data')

    Attributes:
      mesh: with the data or fsdp axis, and the other axes of rules.AXES that have more than one device.
    """

    mesh: Any

    @property
    def name(self) -> str:
        if FSDP_AXIS in self.mesh.shape:
            return FULLY_SHARDED
        return TENSOR if MODEL_AXIS in self.mesh.shape else REPLICATED

    def in_use(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How an array with these logical axes is spread while the loss uses it.

        Raises:
          ValueError: an axis that the layout has no rule for.
          InputError: an axis that does not divide among the devices.
        """
        return self.at_rest(axes, shape) if self.name == FULLY_SHARDED else self._by_rules(axes, shape)

    def _by_rules(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        rules = RULES[self.name]
        unknown = [axis for axis in axes if axis not in rules]
        if unknown:
            raise ValueError(f"layout {self.name} has no rule for the axis {', '.join(unknown)}")
        return PartitionSpec(*(self._along(rules[axis], axis, size) for axis, size in zip(axes, shape, strict=True)))

    def _along(self, mesh_axis: str | None, axis: str, size: int) -> str | None:
        if mesh_axis is None or size % self.mesh.shape[mesh_axis] == 0:
            return mesh_axis
        if axis in MAY_STAY_WHOLE:
            return None
        devices = self.mesh.shape[mesh_axis]
        raise InputError(
            f"`mesh` spreads {axis} over {devices} devices, and {size} does not divide among them: use a {mesh_axis}"
            f" axis of {self._largest_divisor(size, devices)}"
        )

    @staticmethod
    def _largest_divisor(size: int, most: int) -> int:
        return max(count for count in range(1, most) if size % count == 0)

    def at_rest(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How it is spread otherwise: over the data or fsdp axis too, along the first axis of AT_REST that divides
        among its devices. An array without one is spread no further.

        Raises:
          ValueError, InputError: as in_use.
        """
        over = FSDP_AXIS if self.name == FULLY_SHARDED else DATA_AXIS
        spec, devices = list(self._by_rules(axes, shape)), self.mesh.shape[over]
        for axis in AT_REST:
            place = axes.index(axis) if axis in axes else None
            if place is not None and spec[place] is None and shape[place] % devices == 0:
                spec[place] = over
                break
        return PartitionSpec(*spec)

    def places(self, axes: tuple[Any, Any], shapes: tuple[Any, Any]) -> "Places":
        """Of all parameters of an objective, from its axes() and shapes().

        Raises:
          ValueError, InputError: as in_use; the first names the parameter.
        """

        def of(rule: Any, part: int) -> Any:
            def of_leaf(axes: tuple[str, ...], leaf: Any) -> NamedSharding:
                return NamedSharding(self.mesh, rule(axes, leaf.shape))

            return _by_name(of_leaf, axes[part], shapes[part])

        return Places(of(self.in_use, 0), of(self.at_rest, 0), of(self.in_use, 1))


@dataclasses.dataclass(frozen=True)
class Places:
    """Trees of shardings.

    Attributes:
      in_use: of the trained parameters while the loss uses them.
      at_rest: of the trained parameters otherwise, of their noised sum and of the optimizer's moments.
      frozen: of the others.
    """

    in_use: Any
    at_rest: Any
    frozen: Any


def _by_name(of_leaf: Callable[..., Any], axes: Any, shapes: Any) -> Any:
    def named(path: Any, *leaves: Any) -> Any:
        try:
            return of_leaf(*leaves)
        except InputError:
            raise
        except ValueError as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"parameter {name}: {error}") from None

    return jax.tree_util.tree_map_with_path(named, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An axis, counted from the end, that is spread over the devices along a mesh axis (inside shard_map)."""

    axis_name: str
    axis: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = len(shape) + self.axis
        return (*shape[:axis], shape[axis] * jax.lax.axis_size(self.axis_name), *shape[axis + 1 :])

    def gather(self, shard: jax.Array) -> jax.Array:
        """The whole array, from the shards of all devices."""
        return jax.lax.all_gather(shard, self.axis_name, axis=shard.ndim + self.axis, tiled=True)

    def sum_and_scatter(self, whole: jax.Array) -> jax.Array:
        """This device's shard of the sum of every device's array."""
        axis = whole.ndim + self.axis
        return jax.lax.psum_scatter(whole, self.axis_name, scatter_dimension=axis, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_units(mesh: Mesh) -> NamedSharding:
    """The leading axis, one entry a slot, is spread over the devices."""
    return NamedSharding(mesh, spread(mesh))


def rows_here(mesh: Mesh) -> list[int]:
    """The numbers of the rows of devices of which this process has some."""
    here: Any = over_units(mesh).addressable_devices_indices_map((rows(mesh),)).values()
    return sorted({int(index[0].start or 0) for index in here})


def from_rows(mesh: Mesh, parts: Mapping[int, Any]) -> Any:
    """The tree of arrays whose leading axis is spread over the rows of devices, from the parts of single rows.

    Args:
      parts: for every row of `rows_here` a tree of arrays of one shape.
    """
    sharding, count = over_units(mesh), rows(mesh)

    def row_of(index: Any, size: int) -> int:
        return int(index[0].start or 0) // size

    def spread_leaf(*leaves: np.ndarray) -> jax.Array:
        by_row, size = dict(zip(parts, leaves, strict=True)), len(leaves[0])
        shape = (count * size, *leaves[0].shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: by_row[row_of(index, size)])

    return jax.tree.map(spread_leaf, *parts.values())


SHARED = PartitionSpec()


def axes_of_rows(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh over which units are spread."""
    return tuple(axis for axis in AXES_OF_ROWS if axis in mesh.shape)


def axes_in_step(mesh: Mesh) -> tuple[str, ...]:
    """The axes of rows along which devices go through loops equally often, because inside of them they wait for each
    other: for parts of one unit's work, which the compiler divides, or for each other's shards.
    """
    waits = FSDP_AXIS in mesh.shape or (MODEL_AXIS in mesh.shape and not is_one_row(mesh))
    return axes_of_rows(mesh) if waits else ()


def rows(mesh: Mesh) -> int:
    """Rows of devices along the model axis, each of which has units of its own."""
    return math.prod(mesh.shape[axis] for axis in axes_of_rows(mesh))


def spread(mesh: Mesh) -> PartitionSpec:
    """The spec of a leading axis that is spread over the rows of devices."""
    return PartitionSpec(axes_of_rows(mesh))


def specs(shardings: Any) -> Any:
    """The tree of the specs of a tree of shardings."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def of_rows(specs: Any) -> Any:
    """What specs say of the axes of rows alone: the parts that each row of devices holds."""
    return jax.tree.map(
        lambda spec: PartitionSpec(*(names if names in AXES_OF_ROWS else None for names in spec)), specs
    )


def shards(specs: Any) -> "list[Gathered | None]":
    """For every leaf the axis of which a row of devices holds a shard, or None."""

    def of_leaf(spec: PartitionSpec) -> Gathered | None:
        spread = [(names, axis - len(spec)) for axis, names in enumerate(spec) if names in AXES_OF_ROWS]
        return Gathered(*spread[0]) if spread else None

    return [of_leaf(spec) for spec in jax.tree.leaves(specs)]


def side_by_side(mesh: Mesh, specs: Any) -> Any:
    """Specs of sums with a leading axis in front: of rows of devices that have sums of their own, or of slices where a
    sum is spread over the devices of a slice already.
    """

    def of_leaf(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(tuple(axis for axis in axes_of_rows(mesh) if axis not in spec), *spec)

    return jax.tree.map(of_leaf, specs)


def is_one_row(mesh: Mesh) -> bool:
    """Whether all units lie on one row of devices along the model axis, so that nothing is added up over rows."""
    return MODEL_AXIS in mesh.shape and rows(mesh) == 1


def sum_over_rows(mesh: Mesh, stacked: Any, in_use: Any, at_rest: Any) -> Any:
    """The tree of sums over the rows of devices, each device with its part of them alone.

    Formal guarantee: every number of the result is the sum of one number of each row, so where rows have disjoint units
    one unit changes it by what it changes in its own row. Tested by tests/sharding/tensor_test.py::
    test_a_sum_does_not_depend_on_the_mesh and ::test_fully_sharded_parameters_give_the_sums_of_whole_ones.

    Args:
      stacked: tree of [rows, ...], each row's sums on its own devices; of what is spread over the devices of an fsdp
        axis, [slices, ...] and sums over that axis already.
      in_use, at_rest: specs of the sums of one row, and of the result.
    """

    def of_leaf(one: jax.Array, held: PartitionSpec, spec: PartitionSpec) -> jax.Array:
        part, over = one[0], tuple(axis for axis in axes_of_rows(mesh) if axis not in held)
        if DATA_AXIS in over and DATA_AXIS in spec:
            axis = spec.index(DATA_AXIS)
            part = jax.lax.psum_scatter(part, DATA_AXIS, scatter_dimension=axis, tiled=True)
            over = tuple(axis for axis in over if axis != DATA_AXIS)
        return jax.lax.psum(part, over) if over else part

    def on_one_device(stacked: Any) -> Any:
        return jax.tree.map(of_leaf, stacked, in_use, at_rest)

    return on_each_device(mesh, on_one_device, (side_by_side(mesh, in_use),), at_rest)(stacked)


def in_shards(
    mesh: Mesh, specs: Sequence[PartitionSpec], compute: Callable[..., jax.Array], array: Any, number: int, shared: Any
) -> jax.Array:
    """The array, of which compute(shard, index of the shard's first coordinate along each axis, shared) has replaced
    every shard.

    Args:
      specs: of all arrays; this one has this number.
    """
    spec = specs[number]

    def on_one_device(shard: jax.Array, shared: Any) -> jax.Array:
        first: list[Any] = [0] * shard.ndim
        for axis, names in enumerate(spec):
            if names is not None:
                first[axis] = jax.lax.axis_index(names) * shard.shape[axis]
        return compute(shard, first, shared)

    return on_each_device(mesh, on_one_device, (spec, SHARED), spec)(array, shared)


def on_each_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function, run by every device on its own part of the spread arguments and on all of the SHARED ones."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_each_row(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """As on_each_device, but by every row of devices along the model axis, where there is one: within a row, arrays are
    spread as they were before, and the compiler divides the work.

    The specs name the axes of rows alone.
    """
    if MODEL_AXIS not in mesh.shape:
        return on_each_device(mesh, function, in_specs, out_specs)
    if is_one_row(mesh):  # of which the compiler cannot make a function of rows
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes_of_rows(mesh)), check_vma=False
    )
