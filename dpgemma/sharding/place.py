"""Arrays on the devices of a mesh: parameters by the rules of a layout, units dealt out over the data axis."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpgemma.sharding.rules import AT_REST, DATA_AXIS, REPLICATED, RULES


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters lie, by one table of rules: while they are used, and at rest.

    At rest are the parameters that are trained, the moments of the optimizer and the noised sum: these are spread over
    the data axis as well, so that no device holds or updates all of them (Rajbhandari et al. 2020, arXiv 1910.02054).

    >>> from jax.sharding import AbstractMesh
    >>> mesh = AbstractMesh((2,), ("data",))
    >>> Layout().in_use(("layers", "model", "feed_forward"))  # every device holds all of it
    PartitionSpec(None, None, None)
    >>> Layout().at_rest(mesh, ("layers", "model", "feed_forward"), (26, 64, 256))
    PartitionSpec(None, None, 'data')
    """

    name: str = REPLICATED

    def in_use(self, axes: tuple[str, ...]) -> PartitionSpec:
        """How an array with these logical axes is spread while the loss uses it.

        Raises:
          ValueError: an axis that the layout has no rule for.
        """
        rules = RULES[self.name]
        unknown = [axis for axis in axes if axis not in rules]
        if unknown:
            raise ValueError(f"layout {self.name} has no rule for the axis {', '.join(unknown)}")
        return PartitionSpec(*(rules[axis] for axis in axes))

    def at_rest(self, mesh: Any, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How it is spread otherwise: over the data axis too, along the first axis of AT_REST that divides among its
        devices. An array without one is held whole.

        Raises:
          ValueError: an axis that the layout has no rule for.
        """
        spec, devices = list(self.in_use(axes)), mesh.shape[DATA_AXIS]
        for axis in AT_REST:
            place = axes.index(axis) if axis in axes else None
            if place is not None and spec[place] is None and shape[place] % devices == 0:
                spec[place] = DATA_AXIS
                break
        return PartitionSpec(*spec)

    def shardings_in_use(self, mesh: Mesh, axes: Any) -> Any:
        """For a tree of tuples of logical axes, the tree of shardings.

        Raises:
          ValueError: a parameter, by its name, that has an axis without a rule.
        """
        return _by_name(lambda axes: NamedSharding(mesh, self.in_use(axes)), axes)

    def shardings_at_rest(self, mesh: Mesh, axes: Any, shapes: Any) -> Any:
        """As shardings_in_use; `shapes` is the tree of the arrays' shapes and types."""
        return _by_name(lambda axes, leaf: NamedSharding(mesh, self.at_rest(mesh, axes, leaf.shape)), axes, shapes)


def _by_name(of_leaf: Callable[..., Any], axes: Any, *trees: Any) -> Any:
    def named(path: Any, *leaves: Any) -> Any:
        try:
            return of_leaf(*leaves)
        except ValueError as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"parameter {name}: {error}") from None

    return jax.tree_util.tree_map_with_path(named, axes, *trees, is_leaf=lambda x: isinstance(x, tuple))


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


def axis_over_units(spec: PartitionSpec) -> int | None:
    """The number of the axis that is spread over the devices that hold different units; None where there is none."""
    return next((number for number, names in enumerate(spec) if names == DATA_AXIS), None)


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
    """The function, run by every device on its own part of the SPREAD arguments and on all of the SHARED ones."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
