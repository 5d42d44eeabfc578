"""What may reach a loss, and what the audit refuses by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpgemma.privacy import clipping, operations, tracking
from dpgemma.privacy.tracking import UntrackedUse

PARAMS = {"first": {"w": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "stack": {"w": jnp.ones((5, 4, 4))}, "second": {"w": jnp.ones((4, 2))}}
EXAMPLE = jnp.ones((6, 3))


def network(params, x, *, extra=lambda params, x: 0.0, inside=lambda w, x: 0.0):
    """Two layers and a scanned stack between them; `extra` and `inside` smuggle in further uses."""
    x = operations.linear(x, params["first"]["w"]) + operations.vector(params["first"]["bias"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(operations.linear(x, w)) + inside(w, x), None), x, params["stack"]["w"])
    return operations.linear(x, params["second"]["w"]).sum() + extra(params, x)


def open_boxes(tree):
    """What tree.map can do to any pytree: the arrays behind the boxes."""
    return jax.tree.leaves(tree)


def test_uses_are_listed_by_parameter():
    uses = tracking.audit(network, PARAMS, EXAMPLE)
    assert {name: list(rules) for name, rules in uses.items()} == {
        "first/w": ["linear"],
        "first/bias": ["vector"],
        "stack/w": ["linear"],
        "second/w": ["linear"],
    }
    assert uses["stack/w"]["linear"].shape == (4, 4)
    assert uses["first/w"]["linear"].taps["x"].shape == (6, 3)


RAW_USES = {
    "matmul": lambda p, x: (x @ p["second"]["w"]).sum(),
    "jnp": lambda p, x: jnp.dot(x, p["second"]["w"]).sum(),
    "arithmetic": lambda p, x: (2.0 * p["second"]["w"] + 1).sum(),
    "method": lambda p, x: p["second"]["w"].sum(),
    "index": lambda p, x: p["second"]["w"][0].sum(),
    "bias_added_by_hand": lambda p, x: (x + p["first"]["bias"]).sum(),
    "asarray": lambda p, x: jnp.asarray(p["second"]["w"]).sum(),
    "opened_by_tree_map": lambda p, x: (x @ open_boxes(p["second"]["w"])[0]).sum(),
    "constant_gradient": lambda p, x: open_boxes(p["second"]["w"])[0].sum(),
    "opened_and_not_differentiable": lambda p, x: jnp.sign(open_boxes(p["second"]["w"])[0]).sum(),
    "penalty": lambda p, x: sum((leaf**2).sum() for leaf in open_boxes(p)),
}


@pytest.mark.parametrize("strategy", ["ghost", "per_layer"])
@pytest.mark.parametrize("name", RAW_USES)
def test_a_parameter_reached_another_way_is_refused_by_name(name, strategy):
    loss = lambda p, x: network(p, x, extra=RAW_USES[name])
    with pytest.raises(UntrackedUse, match=r"parameter (second/w|first/bias) "):
        clipping.clipped_sum(loss, PARAMS, EXAMPLE[None], jnp.ones(1, bool), 1.0, strategy=strategy)


@pytest.mark.parametrize(
    "loss, parameter",
    [
        (lambda p, x: network(p, x, extra=lambda p, x: operations.linear(x, p["second"]["w"]).sum()), "second/w"),
        (lambda p, x: network(p, x, extra=lambda p, x: operations.vector(p["first"]["bias"]).sum()), "first/bias"),
        (lambda p, x: network(p, x, inside=lambda w, x: operations.linear(x, w)), "stack/w"),
        # Not sliced by the loop, so used in each of its rounds.
        (lambda p, x: jax.lax.scan(lambda x, _: (operations.linear(x, p["w"]), None), x, None, 3)[0].sum(), "w"),
        (lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: operations.linear(x, p["w"]), x).sum(), "w"),
        # The same slice, taken twice.
        (lambda p, x: sum(operations.linear(x, jax.tree.map(lambda a: a[1], p["cube"])).sum() for _ in range(2)), "cube"),
        (lambda p, x: jax.jit(lambda w, x: operations.linear(x, w).sum() + operations.linear(-x, w).sum())(p["w"], x), "w"),
    ],
    ids=["linear", "vector", "within_a_scan", "constant_of_a_scan", "constant_of_a_loop", "one_slice", "within_jit"],
)  # fmt: skip
def test_a_second_use_is_refused_by_name(loss, parameter):
    params = {"w": jnp.ones((3, 3)), "cube": jnp.ones((2, 3, 3)), **PARAMS}
    with pytest.raises(UntrackedUse, match=f"parameter {parameter} is used"):
        tracking.audit(loss, params, EXAMPLE)


def test_different_slices_are_different_parameters():
    def loss(params, x):
        for i in range(5):
            x = operations.linear(x, jax.tree.map(lambda a, i=i: a[i], params))
        return x.sum()

    assert tracking.audit(loss, jnp.ones((5, 3, 3)), EXAMPLE)[""]["linear"].shape == (3, 3)


def test_a_scan_takes_such_losses_too():
    loss = lambda p, x: network(p, x, extra=lambda p, x: 0.1 * sum((leaf**2).sum() for leaf in open_boxes(p)))
    got = clipping.clipped_sum(loss, PARAMS, EXAMPLE[None], jnp.ones(1, bool), np.inf)
    expected = jax.grad(loss)(PARAMS, EXAMPLE)
    for a, b in zip(jax.tree.leaves(got.total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_audit_looks_at_shapes_alone():
    shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert tracking.audit(network, shape(PARAMS), shape(EXAMPLE)).keys() == {"first/w", "first/bias", "stack/w", "second/w"}
