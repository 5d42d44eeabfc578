import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpgemma.objectives import cross_entropy as loss

pytestmark = pytest.mark.usefixtures("quick_compiles")


def problem(vocab=1000, tokens=7, width=16, rows=3):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, tokens, width)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    return hidden, embedding, jnp.asarray(rng.integers(0, vocab, (rows, tokens)))


def direct(hidden, embedding, targets, cap):
    logits = jnp.einsum("...d,vd->...v", hidden, embedding, precision="highest")
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("vocab, chunk", [(1000, 8192), (1000, 250), (1000, 300), (997, 128)])
def test_equals_the_direct_form_with_gradients(vocab, chunk, cap):
    hidden, embedding, targets = problem(vocab)

    def ours(h, e):
        return loss.cross_entropy(h, e, targets, final_cap=cap, chunk=chunk)

    np.testing.assert_allclose(ours(hidden, embedding), direct(hidden, embedding, targets, cap), rtol=1e-5, atol=1e-5)
    got = jax.grad(lambda h, e: ours(h, e).sum(), (0, 1))(hidden, embedding)
    expected = jax.grad(lambda h, e: direct(h, e, targets, cap).sum(), (0, 1))(hidden, embedding)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def array_sizes(jaxpr):
    """Sizes of every intermediate array, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape, dtype=np.int64)) if hasattr(variable.aval, "shape") else 0
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from array_sizes(inner)


def test_never_holds_batch_by_tokens_by_vocabulary():
    hidden, embedding, targets = problem(vocab=4096, tokens=64, rows=8)

    def step(chunk):
        return jax.make_jaxpr(jax.grad(lambda h, e: loss.cross_entropy(h, e, targets, chunk=chunk).sum(), (0, 1)))

    assert max(array_sizes(step(512)(hidden, embedding).jaxpr)) <= 8 * 64 * 512
    # The measure itself sees such an array where there is one.
    assert max(array_sizes(step(4096)(hidden, embedding).jaxpr)) >= 8 * 64 * 4096


def test_extreme_logits_stay_finite():
    hidden, embedding, targets = problem()
    value, gradient = jax.value_and_grad(lambda h: loss.cross_entropy(h, 1e4 * embedding, targets, chunk=128).sum())(
        hidden
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1000, 128, 96])
def test_the_likeliest_word_is_found_in_any_chunk(chunk, dtype):
    """Against all logits at once, in the type in which they are computed."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(40, 16)), dtype)
    words = jnp.asarray(rng.normal(size=(1000, 16)), jnp.float32)
    expected = np.asarray(jnp.einsum("nd,vd->nv", hidden, words.astype(dtype), preferred_element_type=jnp.float32))
    *_, found = loss.CrossEntropy(None, chunk).scores(hidden, words, jnp.zeros(40, jnp.int32), with_likeliest=True)
    best = expected.max(axis=1)
    np.testing.assert_allclose(expected[np.arange(40), np.asarray(found)], best, rtol=1e-5)
    assert (np.asarray(found) == expected.argmax(axis=1)).mean() > 0.9
