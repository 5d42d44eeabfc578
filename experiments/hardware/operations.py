"""Floating-point operations of a program's matrix products, counted in its jaxpr."""

import math
from typing import Any

from jax.extend.core import jaxprs_in_params

from accounting.errors import InputError


def of_products(jaxpr: Any, trips: int = 1) -> int:
    """Operations of all dot products: 2 for each multiplication, recomputed activations included.

    Of a program for several devices this counts what one device does along the axes that the program itself names, and
    all of what the compiler divides.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros((3, 4))
    >>> of_products(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr)
    72

    Args:
      jaxpr: of a traced function.
      trips: how often a loop is run whose number of trips is not known before.

    Raises:
      InputError: convolutions, which are not counted.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _of_product(equation)
        elif equation.primitive.name == "conv_general_dilated":
            raise InputError("the model has convolutions, whose operations are not counted")
        else:
            total += _repeated(equation, trips) * _of_parts(equation, trips)
    return total


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _repeated(equation: Any, trips: int) -> int:
    return {"scan": equation.params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)


def _of_parts(equation: Any, trips: int) -> int:
    parts = [of_products(part, trips) for part in jaxprs_in_params(equation.params)]
    return max(parts, default=0) if equation.primitive.name == "cond" else sum(parts)
