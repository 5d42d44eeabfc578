"""Boxes around parameters that only operations with a norm rule may open; `audit` proves that nothing else did."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpgemma.sharding.place import Gathered

MARK, MAPPED = "dpgemma-use:", "dpgemma-mapped:"


class UntrackedUse(TypeError):
    """A parameter reaches the loss by a way that no norm rule covers."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "taps"], meta_fields=["name", "keep", "gathered", "uses"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter as the loss sees it: its shape is known, its value is for operations with a norm rule only.

    Attributes:
      value: the array. Slices along leading (layer) axes are taken by tree.map, which also slices the taps.
      taps: arrays of zeros whose cotangents carry what norms need out of the backward pass.
      name: of the parameter, for messages.
      keep: whether the operations keep their operands, instead of forming gradients.
      gathered: where the value is a shard, which axis it is one of; operations gather it over the devices where they
        use it.
      uses: the list that an audit fills; None outside of audits.
    """

    value: Any
    taps: dict[str, Any]
    name: str
    keep: bool = True
    gathered: "Gathered | None" = None
    uses: "Uses | None" = None

    @property
    def shape(self) -> Any:
        return self.gathered.whole(self.value.shape) if self.gathered else self.value.shape

    def open(self) -> Any:
        """The whole array, for operations with a norm rule."""
        return self.gathered.gather(self.value) if self.gathered else self.value

    @property
    def ndim(self) -> Any:
        return self.value.ndim

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def __getitem__(self, key: Any) -> Any:
        # flax reads a parameter as `param[...]`.
        return self if key is Ellipsis else self.__jax_array__()

    def __getattr__(self, name: str) -> None:
        if not name.startswith("_") and hasattr(jax.Array, name):
            self.__jax_array__()
        raise AttributeError(name)

    def __jax_array__(self) -> None:
        raise UntrackedUse(
            f"parameter {self.name} is used outside of the operations that have a norm rule"
            " (dpgemma.privacy.operations): ghost norms would miss a part of its gradient; use one of them, or"
            " `clipping`=example_scan"
        )


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter by an operation.

    Attributes:
      rule: name of the operation.
      shape: of the parameter as the operation sees it, without layer axes.
      taps: shape and type of every array that the rule needs from the backward pass of one example.
      inputs: leading axes of the parameter that are contracted, for matrix products.
    """

    rule: str
    shape: tuple[int, ...]
    taps: dict[str, jax.ShapeDtypeStruct]
    inputs: int = 0


def _refuse(box: Tracked, *_: Any) -> None:
    box.__jax_array__()


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    for _prefix in ("__", "__r"):
        setattr(Tracked, f"{_prefix}{_name}__", _refuse)
for _name in ("neg", "pos", "abs", "iter", "len", "bool", "array", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tracked, f"__{_name}__", _refuse)


class Uses(dict[str, dict[str, "Use"]]):
    """For each parameter's name, its uses by rule. Compared by identity, as static data of a pytree has to be."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def record(box: Tracked, use: Use, output: Any, *inputs: Any) -> Any:
    """Returns what an operation gives while it is audited: zeros of the output's shape.

    The zeros depend on a named marker of the box and on the operation's other inputs, so that the jaxpr shows this use.
    """
    assert box.uses is not None
    known = box.uses.setdefault(box.name, {}).setdefault(use.rule, use)
    if known != use:
        raise UntrackedUse(
            f"parameter {box.name} is used twice by {use.rule}, with different shapes: ghost norms need one use of each"
        )
    marks = [checkpoint_name(box.value, MARK + f"{use.rule}:{box.name}")]
    # A scalar here; an array where the operation is mapped over an axis that the parameter does not have.
    marks += [checkpoint_name(x.reshape(-1)[0].astype(jnp.float32), MAPPED + box.name) for x in inputs]
    zero = sum(mark.reshape(-1)[0] * 0 for mark in marks).astype(output.dtype)
    return _once(jnp.zeros(output.shape, output.dtype) + zero, box.name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _once(x: jax.Array, name: str) -> Any:
    return x


@_once.defjvp
def _once_jvp(name: str, primals: Any, tangents: Any) -> tuple[Any, Any]:
    raise UntrackedUse(
        f"the loss differentiates through parameter {name}: ghost norms know the loss's own gradient only"
    )


def gathered_where_used(frozen: Any, shards: list[Any]) -> Any:
    """The tree of parameters that are not trained, of which those that are shards are boxed.

    Args:
      shards: for every leaf the axis that is spread over devices, or None.
    """
    if not any(shards):
        return frozen
    return boxes(frozen, [{} for _ in shards], keep=False, shards=shards)


def leaf_names(tree: Any) -> list[str]:
    """Names of a tree's leaves in order, path entries joined by slashes."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def boxes(
    params: Any,
    taps: list[dict[str, Any]],
    *,
    keep: bool = True,
    shards: list[Any] | None = None,
    uses: Uses | None = None,
) -> Any:
    """The tree of parameters with every leaf boxed; `taps` and `shards` in the order of the leaves."""
    leaves, structure = jax.tree.flatten(params)
    named = zip(leaves, taps, leaf_names(params), shards or [None] * len(leaves), strict=True)
    return jax.tree.unflatten(
        structure, [Tracked(leaf, tap, name, keep, shard, uses) for leaf, tap, name, shard in named]
    )
