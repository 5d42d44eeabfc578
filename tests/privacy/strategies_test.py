"""Every way of clipping against the definition, for every architecture."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpgemma.gemma import decoder, lora
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.objectives import cross_entropy as gemma_loss
from dpgemma.privacy import norm_rules as ghost_norms
from dpgemma.privacy import operations, tracking
from dpgemma.privacy import uses as audit
from tests import objectives as loss_lib
from tests.privacy import sums

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "gemma/golden/logits.npz")
CONFIGS = {name: hf_config.from_hf_config(content) for name, content in json.loads(str(GOLDEN["configs"])).items()}


def families(*quick):
    """Every architecture; those that are not quick, and have no operation that the quick ones lack, run with
    -m slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CONFIGS]


WAYS = {
    "vmap": dict(strategy="vmap", microbatch_size=4),
    "ghost": dict(strategy="ghost", microbatch_size=2),
    "example_scan": dict(strategy="example_scan"),
    "example_scan_2": dict(strategy="example_scan", microbatch_size=2),
}
CLIP_NORM = 0.05


def parameters_of(config):
    rng = np.random.default_rng(0)
    values = decoder.parameter_shapes(config)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), values)


def batch_of(vocab_size, shape=(4, 10)):
    """Few words, so that they repeat and meet each other in the tied embedding; some tokens are not scored."""
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(4, min(12, vocab_size), shape), jnp.int32)
    scored = jnp.asarray(rng.random(shape) < 0.8)
    return {"row": {"tokens": tokens, "scored": scored}, "factor": jnp.ones(shape[0])}


@functools.cache
def compiled(name, adapters=False):
    """(trainable parameters, function from (parameters, batch, mask) to the result of every way, compiled together)."""
    config = CONFIGS[name]
    if adapters:
        config = dataclasses.replace(config, lora=lora.adapters(config, 3, 6.0, "all"))
    trainable, frozen = lora.split(config, parameters_of(config))
    row_loss = loss_lib.row_loss(config, bos=2)

    def loss(p, example):
        return row_loss(p, frozen, example["row"]) * example["factor"]

    @jax.jit
    def every_way(params, batch, mask):
        return {way: sums.clipped_sum(loss, params, batch, mask, CLIP_NORM, **options) for way, options in WAYS.items()}

    return config, trainable, every_way


def relative(got, expected):
    distance = sum(
        float(jnp.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )
    return (distance / sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(expected))) ** 0.5


# What the bounds of all roundings take off a clip factor of these models; sums of what is not clipped agree to 1e-5.
MARGIN = 1e-4


def check(results, mask):
    reference = results["vmap"]
    for got in results.values():
        assert relative(got.total, reference.total) < MARGIN
        finite = mask & np.isfinite(reference.stats.norms)
        np.testing.assert_allclose(got.stats.norms[finite], reference.stats.norms[finite], rtol=1e-5)
        np.testing.assert_array_equal(np.isfinite(got.stats.norms), np.isfinite(reference.stats.norms))
        np.testing.assert_allclose(got.stats.losses, reference.stats.losses, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_every_architecture_has_its_rule(name):
    config = CONFIGS[name]
    config = dataclasses.replace(config, lora=lora.adapters(config, 3, 6.0, "all"))
    params, row_loss = decoder.parameter_shapes(config), loss_lib.row_loss(config, bos=2)
    row = jax.tree.map(lambda x: x[0], batch_of(config.vocab_size)["row"])
    uses = audit.uses_of(lambda p, row: row_loss(p, {}, row), params, row)
    assert set(uses) == set(tracking.leaf_names(params))
    assert sorted(uses["embedder/embedding"]) == ["embedding", "head"]
    assert all(len(rules) == 1 for parameter, rules in uses.items() if parameter != "embedder/embedding")


@pytest.mark.parametrize("name", families("vaultgemma_capped"))
def test_every_way_equals_the_definition(name, adapters=False):
    config, params, every_way = compiled(name, adapters)
    batch, everyone = batch_of(config.vocab_size), np.ones(4, bool)
    results = every_way(params, batch, everyone)
    check(results, everyone)
    assert (results["vmap"].stats.norms > CLIP_NORM).any(), "nothing was clipped"
    padded = np.array([True, False, True, False])
    check(every_way(params, batch, padded), padded)
    # 1e38 overflows in some entries of the gradient, and not in others.
    for poison in (np.nan, np.inf, 1e38, 0.0):
        poisoned = batch | {"factor": batch["factor"].at[2].set(poison)}
        results = every_way(params, poisoned, everyone)
        check(results, everyone)
        if poison != 0.0:
            without = every_way(params, batch, np.array([True, True, False, True]))
            for way in results:
                assert relative(results[way].total, without[way].total) == 0.0, (
                    "a bad example is dropped, and nothing else changes"
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", families("gemma"))
def test_every_way_equals_the_definition_with_adapters(name):
    test_every_way_equals_the_definition(name, adapters=True)


@pytest.mark.parametrize("name", families("gemma"))
def test_units_of_several_rows(name):
    config, params, _ = compiled(name)
    row_loss = loss_lib.row_loss(config, bos=2)

    def rows_apart(p, unit):
        return jnp.mean(jax.vmap(lambda row: row_loss(p, {}, row))(unit["row"]))

    def rows_at_once(p, unit):
        return row_loss(p, {}, unit["row"])

    batch = batch_of(config.vocab_size, (4, 3, 5))
    batch["row"]["scored"] = jnp.ones((4, 3, 5), bool)
    run = jax.jit(
        lambda p, b: (
            {
                way: sums.clipped_sum(rows_at_once, p, b, jnp.ones(4, bool), CLIP_NORM, **WAYS[way])
                for way in ("ghost", "vmap")
            }
            | {
                "apart": sums.clipped_sum(
                    rows_apart, p, b, jnp.ones(4, bool), CLIP_NORM, strategy="vmap", microbatch_size=4
                )
            }
        )
    )
    check(run(params, batch), np.ones(4, bool))


def untied_loss(config):
    """The loss by ({"in": E, "out": E, "rest": ...}), so that autodiff tells the two gradients of the
    embedding apart."""

    def loss(params, row):
        tokens = row["tokens"]
        whole = params["rest"] | {"embedder": {"embedding": params["in"]}}
        hidden = decoder.hidden_states(config, whole, jnp.concatenate([jnp.array([2], jnp.int32), tokens[:-1]]))
        losses = gemma_loss.cross_entropy(hidden, params["out"], tokens, final_cap=config.final_cap)
        return jnp.where(row["scored"], losses, 0.0).sum() / row["scored"].sum()

    return loss


@pytest.mark.parametrize(
    "thresholds", ["given", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uniform", "dimension"))]
)
@pytest.mark.parametrize("name", families("vaultgemma_capped"))
def test_per_layer_equals_its_definition(name, thresholds):
    config, params, _ = compiled(name)
    row_loss, batch = loss_lib.row_loss(config, bos=2), batch_of(config.vocab_size)
    rest = {k: v for k, v in params.items() if k != "embedder"}
    split = {"in": params["embedder"]["embedding"], "out": params["embedder"]["embedding"], "rest": rest}
    gradients = jax.jit(jax.vmap(jax.grad(untied_loss(config)), (None, 0)))(split, batch["row"])
    gradients = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients)

    def layered(path):
        return any("blocks" in str(key) for key in path)

    rng, given_shares = np.random.default_rng(5), {}
    weights, clipped = [], {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        name_of = "embedder/embedding" if key in ("in", "out") else key.removeprefix("rest/")
        groups = leaf.shape[1] if layered(path) else 1
        size = leaf[0].size / groups
        weight = {
            "uniform": 1.0,
            "dimension": size**0.5,
            "given": given_shares.setdefault(name_of, rng.random(groups) + 0.1),
        }[thresholds]
        weights.append((key, leaf.reshape(4, groups, -1), np.broadcast_to(weight, groups)))
    total = sum((w**2).sum() for key, _, w in weights if key not in ("in", "out"))
    total += sum(w for key, _, w in weights if key in ("in", "out"))[0] ** 2
    for key, leaf, weight in weights:
        bound = CLIP_NORM * weight / total**0.5
        length = np.linalg.norm(leaf, axis=-1)
        clipped[key] = (np.minimum(1.0, bound / length)[..., None] * leaf).sum(axis=0)
    expected = {k.removeprefix("rest/"): v for k, v in clipped.items() if k not in ("in", "out")}
    expected["embedder/embedding"] = clipped["in"] + clipped["out"]

    got = jax.jit(
        lambda p, b: sums.clipped_sum(
            lambda p, e: row_loss(p, {}, e["row"]),
            p,
            b,
            jnp.ones(4, bool),
            CLIP_NORM,
            strategy="per_layer",
            microbatch_size=4,
            thresholds=given_shares if thresholds == "given" else thresholds,
        )
    )(params, batch)
    whole = jax.jit(jax.vmap(jax.grad(lambda p, e: row_loss(p, {}, e)), (None, 0)))(params, batch["row"])
    norms = np.sqrt(sum((np.asarray(g, np.float64).reshape(4, -1) ** 2).sum(axis=1) for g in jax.tree.leaves(whole)))
    np.testing.assert_allclose(got.stats.norms, norms, rtol=1e-5)
    assert got.sensitivity == CLIP_NORM
    for path, leaf in jax.tree_util.tree_leaves_with_path(got.total):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        wanted = expected[key].reshape(leaf.shape)
        assert np.linalg.norm(leaf - wanted) < MARGIN * np.linalg.norm(wanted), key


def mixed_loss(shapes):
    """A loss with one of each operation, over any shapes."""

    def loss(params, example):
        x = operations.embedding(example["tokens"], params["words"], jnp.float32)
        x = x * (1 + operations.vector(params["scale"]))
        x = jnp.tanh(operations.linear(x, params["w"]))
        x = operations.linear(x, params["back"], inputs=2) + operations.vector(params["bias"])
        return gemma_loss.cross_entropy(
            x, params["words"], example["targets"], final_cap=shapes["cap"], chunk=shapes["chunk"]
        ).mean()

    return loss


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_any_shapes_with_repeated_tokens(data):
    check_any_shapes(data)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_shapes_with_repeated_tokens_at_length(data):
    check_any_shapes(data)


def check_any_shapes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    vocab, width, heads, head, length, batch = draw(2, 40), draw(1, 24), draw(1, 3), draw(1, 8), draw(1, 33), draw(1, 5)
    shapes = {"cap": data.draw(st.sampled_from([None, 2.0])), "chunk": draw(1, vocab)}
    rng = np.random.default_rng(draw(0, 2**31))

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "words": array(vocab, width),
        "scale": array(width),
        "w": array(width, heads, head),
        "back": array(heads, head, width),
        "bias": array(width),
    }

    def ids():
        return jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)

    examples = {"tokens": ids(), "targets": ids()}
    loss, mask, norm = mixed_loss(shapes), jnp.asarray(rng.random(batch) < 0.8), float(10 ** rng.uniform(-2, 1))
    run = jax.jit(
        lambda p, e, m: [
            sums.clipped_sum(loss, p, e, m, bound, strategy=way, microbatch_size=batch)
            for way in ("vmap", "ghost", "example_scan")
            for bound in (norm, 1e6)
        ]
    )
    clipped, whole, *others = run(params, examples, mask)
    for i, got in enumerate(others):
        np.testing.assert_allclose(got.stats.norms, whole.stats.norms, rtol=1e-5)
        if mask.any() and i % 2:  # nothing is clipped
            assert relative(got.total, whole.total) < 1e-5
        elif mask.any():  # where a gradient's terms nearly cancel, bounds of their roundings take off more
            assert relative(got.total, clipped.total) < 2e-3


# One wrong rule per operation; each must be seen by the comparison above.
WRONG = {
    "vector_norm": ("_vector_norms", lambda right: lambda gradient: right(gradient[:1])),
    "product_norm": ("_product_norms", lambda right: lambda x, g, platform: right(x[:-1], g[:, :-1], platform)),
    "row_norm_without_repeats": ("_row_norms", lambda right: lambda ids, g: right(jnp.arange(len(ids)), g)),
    "tied_norm_without_the_cross_term": (
        "_tied_norms",
        lambda right: (
            lambda rows, head, platform: (
                ghost_norms._row_norms(rows["ids"], rows["g"])
                + ghost_norms._product_norms(head["h"], head["delta"], platform)
            )
        ),
    ),
    "weighted_sum_of_rows": (
        "weighted_sum",
        lambda right: lambda use, taps, f, keep: right(use, taps, f, keep) * (0.99 if use.rule == "embedding" else 1),
    ),
    "weighted_sum_of_products": (
        "weighted_sum",
        lambda right: lambda use, taps, f, keep: right(use, taps, f, keep) * (0.99 if use.rule == "linear" else 1),
    ),
    "weighted_sum_of_vectors": (
        "weighted_sum",
        lambda right: lambda use, taps, f, keep: right(use, taps, f, keep) * (0.99 if use.rule == "vector" else 1),
    ),
    "weighted_sum_of_the_head": (
        "weighted_sum",
        lambda right: lambda use, taps, f, keep: right(use, taps, f, keep) * (0.99 if use.rule == "head" else 1),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_fails_the_comparison(name, monkeypatch):
    attribute, wrong = WRONG[name]
    monkeypatch.setattr(ghost_norms, attribute, wrong(getattr(ghost_norms, attribute)))
    test_shapes = {"cap": 2.0, "chunk": 5}
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {"words": array(12, 6), "scale": array(6), "w": array(6, 2, 3), "back": array(2, 3, 6), "bias": array(6)}

    def ids():
        return jnp.asarray(rng.integers(0, 12, (4, 9)), jnp.int32)

    examples = {"tokens": ids(), "targets": ids()}

    def run(way):
        return sums.clipped_sum(
            mixed_loss(test_shapes), params, examples, jnp.ones(4, bool), 0.1, strategy=way, microbatch_size=4
        )

    reference, got = run("vmap"), run("ghost")
    same_norms = np.allclose(got.stats.norms, reference.stats.norms, rtol=1e-5)
    assert not (same_norms and relative(got.total, reference.total) < 1e-5)


@pytest.mark.parametrize("platform, dtype", [("cpu", jnp.float32), ("gpu", jnp.float32), ("gpu", jnp.bfloat16)])
def test_rows_are_added_in_the_same_way_by_the_programs_of_all_platforms(platform, dtype):
    """Also where one id occurs often."""
    rng = np.random.default_rng(0)
    table, rows = rng.standard_normal((50, 8)), jnp.asarray(rng.standard_normal((200, 8)), jnp.float32)
    table = jnp.asarray(table, dtype)
    for ids in (rng.integers(0, 50, 200), np.full(200, 7)):
        expected = np.asarray(table, np.float64)
        np.add.at(expected, ids, np.asarray(rows, np.float64))
        found = operations.add_rows(table, jnp.asarray(ids), rows, platform)
        # The product adds up in float32 and rounds once.
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-4, rtol=float(jnp.finfo(dtype).eps))
        assert found.dtype == dtype
    program = jax.jit(lambda *x: operations.add_rows(*x, platform)).lower(table, jnp.asarray(ids), rows).as_text()
    _, scatter = program.split('"stablehlo.scatter"')
    assert ("stablehlo.add" in scatter.partition("}) :")[0]) == (platform == "cpu")
