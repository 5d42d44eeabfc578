"""Arrays on the devices of a mesh: parameters by the rules of a layout, units dealt out over the data axis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpgemma.sharding.rules import DATA_AXIS, REPLICATED, RULES


@dataclasses.dataclass(frozen=True)
class Layout:
    """One table of rules.

    >>> tuple(Layout().spec(("layers", "model", "heads")))  # every device holds all of it
    (None, None, None)
    """

    name: str = REPLICATED

    def spec(self, axes: tuple[str, ...]) -> PartitionSpec:
        """How an array with these logical axes is spread.

        Raises:
          ValueError: an axis that the layout has no rule for.
        """
        rules = RULES[self.name]
        unknown = [axis for axis in axes if axis not in rules]
        if unknown:
            raise ValueError(f"layout {self.name} has no rule for the axis {', '.join(unknown)}")
        return PartitionSpec(*(rules[axis] for axis in axes))

    def shardings(self, mesh: Mesh, axes: Any) -> Any:
        """For a tree of tuples of logical axes, the tree of shardings.

        Raises:
          ValueError: a parameter, by its name, that has an axis without a rule.
        """

        def of_leaf(path: Any, leaf_axes: tuple[str, ...]) -> NamedSharding:
            try:
                return NamedSharding(mesh, self.spec(leaf_axes))
            except ValueError as error:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"parameter {name}: {error}") from None

        return jax.tree_util.tree_map_with_path(of_leaf, axes, is_leaf=lambda x: isinstance(x, tuple))


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
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


SHARED, SPREAD = PartitionSpec(), PartitionSpec(DATA_AXIS)


def in_parts(mesh: Mesh, compute: Callable[..., jax.Array], rows: jax.Array, shared: Any) -> jax.Array:
    """compute(rows, number of the first of them, shared) -> rows, where each device computes some of them for all.

    Rows that do not divide among the devices are computed by every one of them.
    """
    each = len(rows) // mesh.size
    if each == 0 or mesh.size == 1:
        return compute(rows, jax.numpy.int32(0), shared)

    def on_one_device(rows: jax.Array, shared: Any) -> jax.Array:
        first = jax.lax.axis_index(DATA_AXIS) * each
        mine = jax.lax.dynamic_slice_in_dim(rows, first, each)
        return jax.lax.all_gather(compute(mine, first, shared), DATA_AXIS, tiled=True)

    divided = each * mesh.size
    found = on_each_device(mesh, on_one_device, (SHARED, SHARED), SHARED)(rows[:divided], shared)
    if divided == len(rows):
        return found
    return jax.numpy.concatenate([found, compute(rows[divided:], jax.numpy.int32(divided), shared)])


def on_each_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function, run by every device on its own part of the SPREAD arguments and on all of the SHARED ones."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
