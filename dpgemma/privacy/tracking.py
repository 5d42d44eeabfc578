"""Boxes around parameters that only operations with a norm rule may open, and the audit that proves that nothing else did.

Formal guarantee: where `audit` returns, every parameter reaches the loss through uses that are listed, each by an operation of
`privacy.operations` and each at most once, so that the norms which those operations' rules give add up to the norm of the whole
gradient. Anything else is refused by name while the loss is traced, before any data is seen.
Tested by tests/privacy/tracking_test.py.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jax.interpreters import partial_eval

_MARK = "dpgemma-use:"


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
@dataclasses.dataclass(frozen=True)
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
      rule: name of the operation, a key of ghost_norms.RULES.
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


for _name in ("add", "sub", "mul", "matmul", "truediv", "pow"):
    for _prefix in ("__", "__r"):
        setattr(Tracked, f"{_prefix}{_name}__", _refuse)
for _name in ("neg", "abs", "iter", "len"):
    setattr(Tracked, f"__{_name}__", _refuse)


class Uses(dict):
    """For each parameter's name, its uses by rule. Compared by identity, as static data of a pytree has to be."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def record(box: Tracked, use: Use, output: jax.ShapeDtypeStruct):
    """What an operation returns while it is audited: zeros that depend on nothing, with a mark that it has used this box."""
    known = box.uses.setdefault(box.name, {}).setdefault(use.rule, use)
    if known != use:
        raise UntrackedUse(f"parameter {box.name} is used twice by {use.rule}, with different shapes: ghost norms need one use of each")
    mark = checkpoint_name(box.taps["token"], _MARK + f"{use.rule}:{box.name}")
    # The product keeps the mark alive in the jaxpr; it says nothing of the value, which is no part of it.
    return jnp.zeros(output.shape, output.dtype) + (mark.reshape(-1)[0] * 0).astype(output.dtype)


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
      UntrackedUse: a parameter is opened by anything but an operation with a rule, or used more than once by one.
    """
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    params, example = abstract(params), abstract(example)
    uses = Uses()

    def traced(values, tokens, example):
        return loss(boxes(values, [{"token": token} for token in jax.tree.leaves(tokens)], uses=uses), example)

    jaxpr = jax.make_jaxpr(traced)(params, params, example).jaxpr
    names = leaf_names(params)
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    opened = [name for name, is_used in zip(names, used, strict=False) if is_used]
    if opened:
        raise UntrackedUse(
            f"parameter {opened[0]} reaches the loss outside of the operations that have a norm rule (dpgemma.privacy.operations): ghost"
            " norms would miss a part of its gradient; use one of them, or --clipping=example_scan"
        )
    marks = collections.Counter(_marks(jaxpr, names))
    for (mark, _), count in marks.items():
        if count > 1:
            rule, _, name = mark.removeprefix(_MARK).partition(":")
            raise UntrackedUse(f"parameter {name} is used {count} times by {rule}: ghost norms need one use of each")
    return uses


def _marks(jaxpr, names: list[str]):
    """Yields (mark, origin) of every use in a jaxpr whose inputs are the values, the tokens and the example.

    The origin says which slice of which token was marked: how it was computed from the inputs, operation by operation.
    """
    tokens = jaxpr.invars[len(names) : 2 * len(names)]
    yield from _walk(jaxpr, {var: ("token", name) for var, name in zip(tokens, names, strict=True)}, ())


def _walk(jaxpr, origins: dict, where: tuple):
    def origin(atom):
        return ("literal", str(atom.val)) if isinstance(atom, Literal) else origins.get(atom)

    for i, eqn in enumerate(jaxpr.eqns):
        primitive, place = eqn.primitive.name, (*where, i)
        operands = tuple(origin(atom) for atom in eqn.invars)
        if primitive == "name" and eqn.params["name"].startswith(_MARK):
            yield eqn.params["name"], operands[0]
        inner = [sub for value in eqn.params.values() for sub in _jaxprs(value)]
        for sub in inner:
            # The inputs of an inner jaxpr are the last operands of its equation (a cond has its index before them).
            given = (None,) * (len(sub.invars) - len(operands)) + operands[max(len(operands) - len(sub.invars), 0) :]
            if primitive == "scan":
                first = eqn.params["num_consts"] + eqn.params["num_carry"]
                given = (
                    given[: eqn.params["num_consts"]]
                    + (None,) * eqn.params["num_carry"]
                    + tuple(("slice", place, o) for o in given[first:])
                )
            known = {var: o for var, o in zip(sub.invars, given, strict=True) if o is not None}
            for mark, o in _walk(sub, known, place):
                yield mark, o
                # What a loop does not slice, it uses in every round.
                if (primitive == "scan" and not _sliced_at(place, o)) or primitive == "while":
                    yield mark, o
        if not inner and all(o is not None for o in operands):
            origins.update({var: (primitive, str(eqn.params), n, *operands) for n, var in enumerate(eqn.outvars)})


def _sliced_at(place: tuple, origin) -> bool:
    return isinstance(origin, tuple) and (origin[:2] == ("slice", place) or any(_sliced_at(place, part) for part in origin))


def _jaxprs(value):
    """The jaxprs within one parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        closed = getattr(item, "jaxpr", item)
        if hasattr(closed, "eqns"):
            yield closed
