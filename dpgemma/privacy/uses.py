"""How a loss uses its parameters, found out from its shapes alone.

Formal guarantee: where `uses_of` returns, every parameter reaches the loss through uses that are listed, each by an
operation of `privacy.operations` on whole layers of it, and no layer twice by one rule, so that the norms which those
operations' rules give add up to the norm of the whole gradient. Anything else is refused by name while the loss is
traced, before any data is seen. Tested by tests/privacy/audit_test.py.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from dpgemma.privacy.tracking import MAPPED, MARK, UntrackedUse, Uses, boxes, leaf_names

# The only two rules that may both use one parameter: norm_rules knows their gradients' inner product.
_TOGETHER = {"embedding", "head"}


def uses_of(loss: Any, params: Any, example: Any) -> Uses:
    """Traces the loss of one example and lists how each parameter is used.

    Args:
      loss: loss(params, example) -> scalar.
      params, example: arrays, tracers or shapes; only shapes and types are looked at.

    Raises:
      UntrackedUse: a parameter is opened by anything but an operation with a rule, or a layer of it is used more than
        once by one.
    """

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    params, uses = abstract(params), Uses()
    taps: list[dict[str, Any]] = [{} for _ in jax.tree.leaves(params)]
    jaxpr = jax.make_jaxpr(lambda values, example: loss(boxes(values, taps, uses=uses), example))(
        params, abstract(example)
    ).jaxpr
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    shards = {var: _Shard.of(name, leaf, uses) for var, name, leaf in zip(jaxpr.invars, names, leaves, strict=False)}
    used = collections.defaultdict(list)
    for mark, layers in _marks(jaxpr, shards):
        used[mark].extend(layers)
    for mark, layers in used.items():
        count = max(collections.Counter(layers).values())
        if count > 1:
            rule, _, name = mark.partition(":")
            raise UntrackedUse(
                f"parameter {name} is used {count} times by {rule}: ghost norms need one use of each layer"
            )
    for name, rules in uses.items():
        if len(rules) > 1 and set(rules) != _TOGETHER:
            raise UntrackedUse(
                f"parameter {name} is used by {' and '.join(rules)}: no rule knows of the two gradients' inner product"
            )
    return uses


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Which layers of a parameter a variable of a jaxpr holds.

    Outside of loops, a stack of three layers is [[0, 1, 2]], and its second layer [[1]]. Inside a scan over the stack
    the variable holds another layer in each of three rounds: [[0], [1], [2]].

    Attributes:
      name: of the parameter.
      layers: numbers [S, *layer axes], for every round S of the loops around the variable.
    """

    name: str
    layers: np.ndarray

    @classmethod
    def of(cls, name: str, leaf: Any, uses: Uses) -> "_Shard":
        """The whole parameter. Its layer axes are those that no operation sees."""
        shapes = {use.shape for use in uses.get(name, {}).values()} or {leaf.shape}
        axes = min(leaf.ndim - len(shape) for shape in shapes)
        if any(leaf.shape[axes:] != shape for shape in shapes):
            raise _opened(name)
        return cls(name, np.arange(math.prod(leaf.shape[:axes])).reshape(1, *leaf.shape[:axes]))

    @property
    def axes(self) -> int:
        return self.layers.ndim - 1

    def sliced(self, eqn: Any) -> "_Shard | None":
        """The output of an equation that takes whole layers, or rearranges them; None for any other."""
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        rest = before[self.axes :]
        match eqn.primitive.name:
            case "slice":
                starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
                strides = eqn.params["strides"] or (1,) * len(before)
                parts = [slice(*part) for part in zip(starts, limits, strides, strict=True)]
                whole = all(part == slice(0, n, 1) for part, n in zip(parts[self.axes :], rest, strict=True))
                return _Shard(self.name, self.layers[(slice(None), *parts[: self.axes])]) if whole else None
            case "squeeze" if all(axis < self.axes for axis in eqn.params["dimensions"]):
                return _Shard(self.name, self.layers.squeeze(tuple(1 + axis for axis in eqn.params["dimensions"])))
            case "reshape" if eqn.params["dimensions"] is None and after[len(after) - len(rest) :] == rest:
                return _Shard(self.name, self.layers.reshape(len(self.layers), *after[: len(after) - len(rest)]))
            case "copy" | "copy_p" | "pvary" | "sharding_constraint" | "optimization_barrier" if len(eqn.invars) == 1:
                return self
        return None

    def each_round(self) -> "_Shard":
        """What a scan gives its body: one entry of the first axis a round.

        Raises:
          UntrackedUse: the parameter has no layer axis left that a scan could go over.
        """
        if not self.axes:
            raise _opened(self.name)
        return _Shard(self.name, self.layers.reshape(-1, *self.layers.shape[2:]))

    def every_round(self, rounds: int) -> "_Shard":
        """What a loop of so many rounds gives its body when it does not slice the variable: all of it, every time."""
        return _Shard(self.name, np.tile(self.layers, (rounds, *[1] * self.axes)))


def _opened(name: str) -> UntrackedUse:
    return UntrackedUse(
        f"parameter {name} reaches the loss outside of the operations that have a norm rule"
        " (dpgemma.privacy.operations): ghost norms would miss a part of its gradient; use one of them, or"
        " `clipping`=example_scan"
    )


def _marks(jaxpr: Any, shards: dict[str, Any]) -> Iterator[Any]:
    """Yields ("rule:name", numbers of the layers) for every use in a jaxpr.

    Args:
      shards: which variables hold parameters.

    Raises:
      UntrackedUse: such a variable goes into an equation that is neither a use nor a way of taking layers.
    """
    for eqn in jaxpr.eqns:
        given = [None if isinstance(atom, Literal) else shards.get(atom) for atom in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(MAPPED) and eqn.invars[0].aval.ndim:
            name = eqn.params["name"].removeprefix(MAPPED)
            raise UntrackedUse(
                f"parameter {name} is used under vmap within one example: ghost norms need its rows in one call"
            )
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK):
            mark = eqn.params["name"].removeprefix(MARK)
            if given[0] is None:  # it came out of something that is not followed, so nobody knows which layers it holds
                raise _opened(mark.partition(":")[2])
            yield mark, given[0].layers.reshape(-1).tolist()
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


def _given_to(eqn: Any, sub: Any, given: list[Any]) -> dict[str, Any]:
    """Which inputs of an inner jaxpr hold parameters: they are the last operands of its equation (a cond has its index
    before them).
    """
    if len(given) < len(sub.invars):
        if any(given):
            raise _opened(next(filter(None, given)).name)
        return {}
    given = given[len(given) - len(sub.invars) :]
    if eqn.primitive.name == "while":
        given = [shard and shard.every_round(2) for shard in given]
    if eqn.primitive.name == "scan":
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        carried = next((shard for shard in given[consts : consts + carry] if shard), None)
        if carried:
            raise _opened(carried.name)
        given = [
            shard and (shard.every_round(eqn.params["length"]) if i < consts else shard.each_round())
            for i, shard in enumerate(given)
        ]
    return {var: shard for var, shard in zip(sub.invars, given, strict=True) if shard}


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs within one parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        closed = getattr(item, "jaxpr", item)
        if hasattr(closed, "eqns"):
            yield closed
