"""Sums of squares are added as they are written, in the programs that are compiled from them."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dpgemma.privacy import norm_rules, norms

# The last long axis but one is of prime length: it cannot be divided into equal blocks.
SHAPES = [(4096, 8), (1152, 64), (26, 1152, 16), (18, 4, 256, 8), (25600, 4), (2**20,), (512, 4096), (8209, 3), (3,)]
T, P, Q, V = 24, 40, 56, 96


def rows(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, 3, *shape), dtype)  # layers and examples in front


TAPS = {
    "instantiate": {"linear": {"x": rows(T, 3), "g": rows(T, 5)}},
    "gram": {"linear": {"x": rows(T, P), "g": rows(T, Q)}},
    "vector": {"vector": {"gradient": rows(P, Q)}},
    "embedding": {"embedding": {"ids": rows(T, dtype=jnp.float32), "g": rows(T, P)}},
    "head": {"head": {"h": rows(T, P), "delta": rows(4, T, V // 4)}},
    "tied": {
        "embedding": {"ids": rows(T, dtype=jnp.float32), "g": rows(T, P)},
        "head": {"h": rows(T, P), "delta": rows(4, T, V // 4)},
    },
}


def sums(text):
    """Of every sum of an optimised program: the lengths of the axes that it adds over."""
    shapes = {name: shape for name, shape in re.findall(r"%?([\w.\-]+) = \w+\[([\d,]*)\]", text)}
    shapes |= {name: shape for name, shape in re.findall(r"(param_[\w.\-]+): \w+\[([\d,]*)\]", text)}
    found = []
    for operand, axes in re.findall(r" reduce\(%?([\w.\-]+), .*?dimensions=\{([\d,]*)\}", text):
        lengths = [int(length) for length in shapes[operand].split(",")]
        found.append([lengths[int(axis)] for axis in axes.split(",") if lengths[int(axis)] > 1])
    return found


def programs():
    """(name, function, arguments as shapes, the most additions in a row by which a norm is bounded; None for rules)."""
    for shape in SHAPES:
        tree = {"a": jax.ShapeDtypeStruct(shape, jnp.bfloat16 if shape[0] % 2 else jnp.float32)}
        additions = 2 * (norms.margin(tree) / norms.UNIT_ROUNDOFF - 16)
        yield f"norm of {shape}", norms.l2_norm, tree, additions
        several = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), tree)
        yield f"norms of {shape}", jax.vmap(norms.l2_norm), several, additions
    for platform in ("cpu", "tpu"):  # which choose other ways to the norm of a product

        def of_layers(taps, platform=platform):
            return jax.lax.map(jax.vmap(lambda one: norm_rules.example_norms(one, platform)), taps)

        for name, taps in TAPS.items():
            yield f"rule {name} for {platform}", of_layers, taps, None


def joined(compiler):
    """(name, lengths) of the programs in which a compiler has joined sums: more additions than the bound of a norm
    knows of, or sums over several axes in those of rules, whose bounds add up the lengths of axes.
    """
    device, found = None, []
    if compiler == "tpu":
        device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2x1").devices[0]
    for name, function, arguments, most in programs():
        if device is not None:
            here = SingleDeviceSharding(device)
            arguments = jax.tree.map(
                lambda leaf, here=here: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), arguments
            )
        added = sums(jax.jit(function).trace(arguments).lower().compile().as_text())
        if most is None:
            wrong = any(len(lengths) > 1 for lengths in added)
        else:
            wrong = sum(math.prod(lengths) - 1 for lengths in added) > most
        if wrong or not added:
            found.append([name, added])
    return found


@pytest.mark.parametrize("compiler", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_compilers_join_no_sums(compiler):
    if compiler == "cpu":
        assert not joined("cpu")
        return
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed")
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    code = "import json; from tests.privacy.norms_test import joined; print(json.dumps(joined('tpu')))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_that_vanish_one_by_one_are_paid_for(shape):
    """Behind a number of one, squares of less than half a unit in its last place change nothing if they come alone."""
    x = np.full(shape, 2.0**-12.51, np.float32)
    x[(0,) * (len(shape) - 1)] = 1
    exact = np.linalg.norm(x.astype(np.float64))
    for norm in (norms.l2_norm, jax.jit(norms.l2_norm)):
        assert exact <= float(norm({"x": jnp.asarray(x)})) * (1 + norms.margin({"x": x}))


def gamma(terms):
    """Higham 2002, section 3.1: the most that a float32 sum of products with so many terms is off, relatively."""
    return terms * 2.0**-24 / (1 - terms * 2.0**-24)


def lengths(rows):
    return np.linalg.norm(rows, axis=-1)


@pytest.mark.parametrize("shape", [(8, 700, 300), (64, 90, 80), (200, 40, 30)], ids=str)
@pytest.mark.parametrize("cancels", [False, True])
def test_the_slack_of_inner_products_is_what_their_roundings_may_add_up_to(shape, cancels):
    """Written out in float64 over all pairs of rows: each of the terms alone is a part of it."""
    length, fan_in, fan_out = shape
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((length, n)).astype(np.float32) for n in (fan_in, fan_out))
    if cancels:  # equal inputs and cotangents of either sign
        x[:], g[length // 2 :] = x[0], -g[: length // 2]
    square, slack = (float(each) for each in norm_rules._gram(jnp.asarray(x), jnp.asarray(g)[None]))
    x, g = x.astype(np.float64), g.astype(np.float64)
    by_x, by_g = x @ x.T, g @ g.T
    pairs_of_x, pairs_of_g = (np.outer(lengths(each), lengths(each)) for each in (x, g))
    expected = gamma(fan_in) * (pairs_of_x * np.abs(by_g)).sum() + gamma(fan_out) * (np.abs(by_x) * pairs_of_g).sum()
    expected += gamma(2 * length - 2) * np.abs(by_x * by_g).sum()
    assert expected <= slack < 1.5 * expected
    assert abs(square - (by_x * by_g).sum()) <= slack


def test_the_slack_of_a_tied_embedding_knows_what_is_added_up_in_a_row():
    """The head's rows of the input's words may cancel, the lengths that are added up in them do not."""
    words, length, width = 6, 128, 8
    rng = np.random.default_rng(0)
    ids = rng.integers(0, words, length)
    g, h = (rng.standard_normal((length, width)).astype(np.float32) for _ in range(2))
    delta = rng.standard_normal((1, length, words)).astype(np.float32)
    h[length // 2 :], delta[:, length // 2 :] = h[: length // 2], -delta[:, : length // 2]
    rows = {"ids": jnp.asarray(ids, jnp.float32), "g": jnp.asarray(g)}
    head = {"h": jnp.asarray(h), "delta": jnp.asarray(delta)}
    alone = norm_rules._row_norms(rows["ids"], rows["g"]) + norm_rules._product_norms(head["h"], head["delta"], "cpu")
    together = norm_rules._tied_norms(rows, head, "cpu")
    added = np.abs(delta[0][:, ids].T.astype(np.float64)) @ lengths(h.astype(np.float64))
    expected = 2 * (lengths(g.astype(np.float64)) * added).sum() * gamma(length)
    assert expected <= float(together.slack - alone.slack)
