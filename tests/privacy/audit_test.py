"""What may reach a loss, and what the audit refuses by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpgemma.privacy import operations
from dpgemma.privacy import uses as audit
from dpgemma.privacy.tracking import UntrackedUse
from tests.privacy import sums

PARAMS = {
    "first": {"w": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "stack": {"w": jnp.ones((5, 4, 4))},
    "second": {"w": jnp.ones((4, 2))},
}
EXAMPLE = jnp.ones((6, 3))


def network(params, x, *, extra=lambda params, x: 0.0, inside=lambda w, x: 0.0):
    """Two layers and a scanned stack between them; `extra` and `inside` smuggle in further uses."""
    x = operations.linear(x, params["first"]["w"]) + operations.vector(params["first"]["bias"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(operations.linear(x, w)) + inside(w, x), None), x, params["stack"]["w"])
    return operations.linear(x, params["second"]["w"]).sum() + extra(params, x)


def first(a):
    return a[0]


def first_of_two(a):
    return a[0:2][0]


def open_boxes(tree):
    """What tree.map can do to any pytree: the arrays behind the boxes."""
    return jax.tree.leaves(tree)


def test_uses_are_listed_by_parameter():
    uses = audit.uses_of(network, PARAMS, EXAMPLE)
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
    "scaled_by_tree_map": lambda p, x: operations.linear(x, jax.tree.map(lambda a: 100 * a, p["second"]["w"])).sum(),
    "transposed": lambda p, x: operations.linear(
        x @ jnp.ones((4, 2)), jax.tree.map(jnp.transpose, p["second"]["w"])
    ).sum(),
    "part_of_a_layer": lambda p, x: operations.linear(x[:, :2], jax.tree.map(lambda a: a[:2], p["second"]["w"])).sum(),
    "before_an_operation": lambda p, x: operations.linear(x @ open_boxes(p["second"]["w"])[0], jnp.ones((2, 3))).sum(),
    "compared": lambda p, x: jnp.where(p["second"]["w"] == 0, 0.0, 1.0).sum(),
    "carried_by_a_loop": lambda p, x: jax.lax.scan(
        lambda w, _: (w, operations.linear(x, w).sum()), p["second"]["w"], None, 2
    )[1].sum(),
    "handed_through_jit": lambda p, x: operations.linear(x, jax.jit(lambda box: box)(p["second"]["w"])).sum(),
    "handed_through_cond": lambda p, x: operations.linear(
        x, jax.lax.cond(x.sum() > 0, lambda b: b, lambda b: b, p["second"]["w"])
    ).sum(),
    "penalty": lambda p, x: sum((leaf**2).sum() for leaf in open_boxes(p)),
}


@pytest.mark.parametrize("strategy", ["ghost", "per_layer"])
@pytest.mark.parametrize("name", RAW_USES)
def test_a_parameter_reached_another_way_is_refused_by_name(name, strategy):
    def loss(p, x):
        return network(p, x, extra=RAW_USES[name])

    with pytest.raises(UntrackedUse, match=r"parameter (second/w|first/bias) "):
        sums.clipped_sum(loss, PARAMS, EXAMPLE[None], jnp.ones(1, bool), 1.0, strategy=strategy)


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
        (
            lambda p, x: sum(operations.linear(x, jax.tree.map(lambda a: a[1], p["cube"])).sum() for _ in range(2)),
            "cube",
        ),
        (
            lambda p, x: sum(
                operations.linear(x, jax.tree.map(lambda a, i=i: a[i : i + 2][i], p["cube"])).sum() for i in (0, 0)
            ),
            "cube",
        ),
        (
            lambda p, x: sum(
                operations.linear(x, jax.tree.map(take, p["cube"])).sum() for take in (first_of_two, first)
            ),
            "cube",
        ),
        (
            lambda p, x: sum(
                jax.lax.scan(lambda x, w: (operations.linear(x, w), None), x, p["cube"])[0].sum() for _ in range(2)
            ),
            "cube",
        ),
        (
            lambda p, x: jax.jit(lambda w, x: operations.linear(x, w).sum() + operations.linear(-x, w).sum())(
                p["w"], x
            ),
            "w",
        ),
    ],
    ids=[
        "linear",
        "vector",
        "within_a_scan",
        "constant_of_a_scan",
        "constant_of_a_loop",
        "one_slice",
        "one_of_windows",
        "overlapping_slices",
        "two_scans",
        "within_jit",
    ],
)
def test_a_second_use_is_refused_by_name(loss, parameter):
    params = {"w": jnp.ones((3, 3)), "cube": jnp.ones((2, 3, 3)), **PARAMS}
    with pytest.raises(UntrackedUse, match=f"parameter {parameter} is used"):
        audit.uses_of(loss, params, EXAMPLE)


def refused_or_measured(loss, params, examples, strategy, message):
    """A rule would give a wrong norm: the ways that need one refuse, a scan of examples measures the whole gradient."""

    def run(strategy):
        return sums.clipped_sum(loss, params, examples, jnp.ones(1, bool), 1.0, strategy=strategy)

    if strategy == "example_scan":
        np.testing.assert_allclose(run(strategy).stats.norms, run("vmap").stats.norms, rtol=1e-5)
    else:
        with pytest.raises(UntrackedUse, match=message):
            run(strategy)


@pytest.mark.parametrize("strategy", ["ghost", "per_layer", "example_scan"])
def test_rows_mapped_within_one_example(strategy):
    """The operands of several calls would be summed where they have to be joined."""

    def loss(p, rows):
        return jax.vmap(lambda row: (operations.linear(row, p["first"]["w"]) ** 2).sum())(rows).sum()

    params, rows = {"first": {"w": PARAMS["first"]["w"]}}, jax.random.normal(jax.random.key(0), (1, 5, 6, 3))
    refused_or_measured(loss, params, rows, strategy, "parameter first/w is used under vmap")


@pytest.mark.parametrize("strategy", ["ghost", "example_scan"])
def test_two_rules_for_one_parameter(strategy):
    def loss(p, x):
        return operations.linear(x, p["w"]).sum() + (operations.vector(p["w"]) ** 2).sum()

    refused_or_measured(
        loss, {"w": jnp.ones((3, 4))}, EXAMPLE[None], strategy, "parameter w is used by linear and vector"
    )


@pytest.mark.parametrize("strategy", ["ghost", "example_scan"])
def test_a_loss_that_differentiates_through_a_parameter(strategy):
    """Its own gradient is no loss's gradient that a rule knows."""

    def loss(p, x):
        return (jax.grad(lambda x: (operations.linear(x, p["w"]) ** 2).sum())(x) ** 2).sum()

    refused_or_measured(loss, {"w": jnp.ones((3, 4))}, EXAMPLE[None], strategy, "differentiates through parameter w")


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: operations.linear(x, jax.tree.map(lambda a: 100 * a, p)).sum(),
        lambda p, x: operations.linear(x, jax.tree.map(jnp.exp, p)).sum(),
        lambda p, x: (operations.linear(x, p) + operations.linear(x, jax.tree.map(jnp.transpose, p))).sum(),
        lambda p, x: operations.linear(jnp.where(p[...] == 0, 0.0, x), p).sum(),
    ],
)
def test_pitfall_2_a_scan_measures_what_it_cannot_track_on_the_whole_gradient(loss):
    params, x = 4 + jnp.eye(6), EXAMPLE.repeat(2, axis=1)
    got = sums.clipped_sum(loss, params, x[None], jnp.ones(1, bool), 1.0)
    assert float(jnp.linalg.norm(got.total)) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(got.stats.norms[0], jnp.linalg.norm(jax.grad(loss)(params, x)), rtol=1e-5)


def test_different_slices_are_different_parameters():
    def loss(params, x):
        for i in range(5):
            x = operations.linear(x, jax.tree.map(lambda a, i=i: a[i], params))
        return x.sum()

    assert audit.uses_of(loss, jnp.ones((5, 3, 3)), EXAMPLE)[""]["linear"].shape == (3, 3)


def test_a_scan_takes_such_losses_too():
    def loss(p, x):
        return network(p, x, extra=lambda p, x: 0.1 * sum((leaf**2).sum() for leaf in open_boxes(p)))

    got = sums.clipped_sum(loss, PARAMS, EXAMPLE[None], jnp.ones(1, bool), np.inf)
    expected = jax.grad(loss)(PARAMS, EXAMPLE)
    for a, b in zip(jax.tree.leaves(got.total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_audit_looks_at_shapes_alone():
    def shape(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    assert audit.uses_of(network, shape(PARAMS), shape(EXAMPLE)).keys() == {
        "first/w",
        "first/bias",
        "stack/w",
        "second/w",
    }
