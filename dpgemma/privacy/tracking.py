"""Boxes around parameters that only operations with a norm rule may open, and the audit that proves that nothing else did.

Formal guarantee: where `audit` returns, every parameter reaches the loss through uses that are listed, each by an operation of
`privacy.operations` on whole layers of it, and no layer twice by one rule, so that the norms which those operations' rules give add up to
the norm of the whole gradient. Anything else is refused by name while the loss is traced, before any data is seen.
Tested by tests/privacy/tracking_test.py.
"""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

_MARK, _MAPPED = "dpgemma-use:", "dpgemma-mapped:"
# Rules that know of each other, where one parameter is used by more than one.
_TOGETHER = {"embedding", "head"}


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An axis, counted from the end, that is spread over the devices along a mesh axis (inside shard_map)."""

    axis_name: str
    axis: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = len(shape) + self.axis
        return (*shape[:axis], shape[axis] * jax.lax.axis_size(self.axis_name), *shape[axis + 1 :])

    def gather(self, shard):
        return jax.lax.all_gather(shard, self.axis_name, axis=shard.ndim + self.axis, tiled=True)

    def sum_and_scatter(self, whole):
        """This device's shard of the sum of every device's array."""
        return jax.lax.psum_scatter(whole, self.axis_name, scatter_dimension=whole.ndim + self.axis, tiled=True)


class UntrackedUse(TypeError):
    """A parameter reaches the loss by a way that no norm rule covers."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "taps"], meta_fields=["name", "keep", "gathered", "uses"])
@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter as the loss sees it: its shape is known, its value is for operations with a norm rule only.

    Attributes:
      value: the array. Slices along leading (layer) axes are taken by tree.map, which also slices the taps.
      taps: arrays of zeros whose cotangents carry what norms need out of the backward pass.
      name: of the parameter, for messages.
      keep: whether the operations keep their operands, instead of forming gradients.
      gathered: where the value is a shard, which axis it is one of; operations gather it over the devices where they use it.
      uses: the list that an audit fills; None outside of audits.
    """

    value: Any
    taps: dict
    name: str
    keep: bool = True
    gathered: "Gathered | None" = None
    uses: "Uses | None" = None

    @property
    def shape(self):
        return self.gathered.whole(self.value.shape) if self.gathered else self.value.shape

    def open(self):
        """The whole array, for operations with a norm rule."""
        return self.gathered.gather(self.value) if self.gathered else self.value

    @property
    def ndim(self):
        return self.value.ndim

    @property
    def dtype(self):
        return self.value.dtype

    def __getitem__(self, key):
        # flax reads a parameter as `param[...]`.
        return self if key is Ellipsis else self.__jax_array__()

    def __getattr__(self, name):
        if not name.startswith("_") and hasattr(jax.Array, name):
            self.__jax_array__()
        raise AttributeError(name)

    def __jax_array__(self):
        raise UntrackedUse(
            f"parameter {self.name} is used outside of the operations that have a norm rule (dpgemma.privacy.operations): ghost norms"
            " would miss a part of its gradient; use one of them, or --clipping=example_scan"
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


def _refuse(box: Tracked, *_):
    box.__jax_array__()


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    for _prefix in ("__", "__r"):
        setattr(Tracked, f"{_prefix}{_name}__", _refuse)
for _name in ("neg", "pos", "abs", "iter", "len", "bool", "array", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tracked, f"__{_name}__", _refuse)


class Uses(dict):
    """For each parameter's name, its uses by rule. Compared by identity, as static data of a pytree has to be."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def record(box: Tracked, use: Use, output: jax.ShapeDtypeStruct, *inputs):
    """What an operation returns while it is audited: zeros, made to depend on marks of its use of the box and on its other inputs."""
    known = box.uses.setdefault(box.name, {}).setdefault(use.rule, use)
    if known != use:
        raise UntrackedUse(f"parameter {box.name} is used twice by {use.rule}, with different shapes: ghost norms need one use of each")
    marks = [checkpoint_name(box.value, _MARK + f"{use.rule}:{box.name}")]
    # A scalar here; an array where the operation is mapped over an axis that the parameter does not have.
    marks += [checkpoint_name(x.reshape(-1)[0].astype(jnp.float32), _MAPPED + box.name) for x in inputs]
    zero = sum(mark.reshape(-1)[0] * 0 for mark in marks).astype(output.dtype)
    return _once(jnp.zeros(output.shape, output.dtype) + zero, box.name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _once(x, name):
    return x


@_once.defjvp
def _once_jvp(name, primals, tangents):
    raise UntrackedUse(f"the loss differentiates through parameter {name}: ghost norms know the loss's own gradient only")


def leaf_names(tree) -> list[str]:
    """Names of a tree's leaves in order, path entries joined by slashes."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def boxes(params, taps: list[dict], *, keep: bool = True, gathered: list | None = None, uses: Uses | None = None):
    """The tree of parameters with every leaf boxed; `taps` and `gathered` in the order of the leaves."""
    leaves, structure = jax.tree.flatten(params)
    named = zip(leaves, taps, leaf_names(params), gathered or [None] * len(leaves), strict=True)
    return structure.unflatten([Tracked(leaf, tap, name, keep, shard, uses) for leaf, tap, name, shard in named])


def audit(loss, params, example) -> Uses:
    """Traces the loss of one example and lists how each parameter is used.

    Args:
      loss: loss(params, example) -> scalar.
      params, example: arrays, tracers or shapes; only shapes and types are looked at.

    Raises:
      UntrackedUse: a parameter is opened by anything but an operation with a rule, or a layer of it is used more than once by one.
    """
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    params, uses = abstract(params), Uses()
    taps = [{} for _ in jax.tree.leaves(params)]
    jaxpr = jax.make_jaxpr(lambda values, example: loss(boxes(values, taps, uses=uses), example))(params, abstract(example)).jaxpr
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    shards = {var: _Shard.of(name, leaf, uses) for var, name, leaf in zip(jaxpr.invars, names, leaves, strict=False)}
    used = collections.defaultdict(list)
    for mark, layers in _marks(jaxpr, shards):
        used[mark].extend(layers)
    for mark, layers in used.items():
        count = max(collections.Counter(layers).values())
        if count > 1:
            rule, _, name = mark.partition(":")
            raise UntrackedUse(f"parameter {name} is used {count} times by {rule}: ghost norms need one use of each layer")
    for name, rules in uses.items():
        if len(rules) > 1 and set(rules) != _TOGETHER:
            raise UntrackedUse(f"parameter {name} is used by {' and '.join(rules)}: no rule knows of the two gradients' inner product")
    return uses


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Which layers of a parameter a variable of a jaxpr holds: numbers [S, *layer axes], for every round S of the loops around it."""

    name: str
    layers: np.ndarray

    @classmethod
    def of(cls, name: str, leaf, uses: Uses) -> "_Shard":
        """The whole parameter. Its layer axes are those that no operation sees."""
        shapes = {use.shape for use in uses.get(name, {}).values()} or {leaf.shape}
        axes = min(leaf.ndim - len(shape) for shape in shapes)
        if any(leaf.shape[axes:] != shape for shape in shapes):
            raise _opened(name)
        return cls(name, np.arange(math.prod(leaf.shape[:axes])).reshape(1, *leaf.shape[:axes]))

    @property
    def axes(self) -> int:
        return self.layers.ndim - 1

    def sliced(self, eqn) -> "_Shard | None":
        """The output of an equation that takes whole layers, or rearranges them; None for any other."""
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        rest = before[self.axes :]
        match eqn.primitive.name:
            case "slice":
                parts = zip(
                    eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"] or (1,) * len(before), strict=True
                )
                parts = [slice(*part) for part in parts]
                whole = all(part == slice(0, n, 1) for part, n in zip(parts[self.axes :], rest, strict=True))
                return _Shard(self.name, self.layers[(slice(None), *parts[: self.axes])]) if whole else None
            case "squeeze" if all(axis < self.axes for axis in eqn.params["dimensions"]):
                return _Shard(self.name, self.layers.squeeze(tuple(1 + axis for axis in eqn.params["dimensions"])))
            case "reshape" if eqn.params["dimensions"] is None and after[len(after) - len(rest) :] == rest:
                return _Shard(self.name, self.layers.reshape(len(self.layers), *after[: len(after) - len(rest)]))
            case "copy" | "copy_p" | "pvary" | "sharding_constraint" | "optimization_barrier" if len(eqn.invars) == 1:
                return self
        return None

    def each_round(self) -> "_Shard | None":
        """What a scan gives its body: one entry of the first axis a round."""
        return _Shard(self.name, self.layers.reshape(-1, *self.layers.shape[2:])) if self.axes else None

    def every_round(self, rounds: int) -> "_Shard":
        """The same in each of so many rounds."""
        return _Shard(self.name, np.tile(self.layers, (rounds, *[1] * self.axes)))


def _opened(name: str) -> UntrackedUse:
    return UntrackedUse(
        f"parameter {name} reaches the loss outside of the operations that have a norm rule (dpgemma.privacy.operations): ghost norms"
        " would miss a part of its gradient; use one of them, or --clipping=example_scan"
    )


def _marks(jaxpr, shards: dict):
    """Yields ("rule:name", numbers of the layers) for every use in a jaxpr.

    Args:
      shards: which variables hold parameters.

    Raises:
      UntrackedUse: such a variable goes into an equation that is neither a use nor a way of taking layers.
    """
    for eqn in jaxpr.eqns:
        given = [None if isinstance(atom, Literal) else shards.get(atom) for atom in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(_MAPPED) and eqn.invars[0].aval.ndim:
            name = eqn.params["name"].removeprefix(_MAPPED)
            raise UntrackedUse(f"parameter {name} is used under vmap within one example: ghost norms need its rows in one call")
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(_MARK) and given[0]:
            yield eqn.params["name"].removeprefix(_MARK), given[0].layers.reshape(-1).tolist()
            continue
        inner = [sub for value in eqn.params.values() for sub in _jaxprs(value)]
        for sub in inner:
            yield from _marks(sub, _given_to(eqn, sub, given))
        held = [shard for shard in given if shard]
        if held and not inner:
            taken = held[0].sliced(eqn)
            if taken is None:
                raise _opened(held[0].name)
            shards[eqn.outvars[0]] = taken


def _given_to(eqn, sub, given: list) -> dict:
    """Which inputs of an inner jaxpr hold parameters: they are the last operands of its equation (a cond has its index before them)."""
    if len(given) < len(sub.invars):
        return {} if not any(given) else _refused(next(filter(None, given)))
    given = given[len(given) - len(sub.invars) :]
    if eqn.primitive.name == "while":
        given = [shard and shard.every_round(2) for shard in given]
    if eqn.primitive.name == "scan":
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        carried = next((shard for shard in given[consts : consts + carry] if shard), None)
        if carried:
            raise _opened(carried.name)
        given = [
            shard and (shard.every_round(eqn.params["length"]) if i < consts else shard.each_round() or _refused(shard))
            for i, shard in enumerate(given)
        ]
    return {var: shard for var, shard in zip(sub.invars, given, strict=True) if shard}


def _refused(shard: _Shard):
    raise _opened(shard.name)


def _jaxprs(value):
    """The jaxprs within one parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        closed = getattr(item, "jaxpr", item)
        if hasattr(closed, "eqns"):
            yield closed
