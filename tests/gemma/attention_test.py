import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpgemma.gemma.blocks import attention, masks
from dpgemma.gemma.config import FULL, SLIDING
from tests.gemma.decoder_test import PLAIN


def problem(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, 2, 3, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 2, 3, 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def attend_causal(q, k, v, config, is_sliding, implementation):
    mask = masks.causal(q.shape[-4], config.window, is_sliding)
    return attention.attend(q, k, v, mask, config, is_sliding, implementation)


@functools.lru_cache
def value_and_gradients(config, implementation):
    def run(q, k, v, cotangent, is_sliding):
        out, pull = jax.vjp(lambda q, k, v: attend_causal(q, k, v, config, is_sliding, implementation), q, k, v)
        return out, *pull(cotangent)

    return jax.jit(run)


@pytest.mark.parametrize("is_sliding", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("length, window", [(7, 3), (256, 100), (300, 1), (700, 257), (513, 600)])
def test_blockwise_equals_dense(length, window, cap, is_sliding):
    config = dataclasses.replace(PLAIN, layer_types=(FULL, SLIDING), window=window, attention_cap=cap, max_length=1024)
    inputs = problem(length)
    expected = value_and_gradients(config, "dense")(*inputs, is_sliding)
    got = value_and_gradients(config, "blockwise")(*inputs, is_sliding)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=5e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("layer_types", [(FULL,), (SLIDING,), (FULL, SLIDING)])
def test_fused_equals_dense(layer_types):
    config = dataclasses.replace(PLAIN, layer_types=layer_types, window=9)
    for is_sliding in [kind == SLIDING for kind in layer_types]:
        for a, b in zip(
            *(value_and_gradients(config, kind)(*problem(40), is_sliding) for kind in ("fused", "dense")), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layer_types", [(FULL,), (SLIDING,), (FULL, SLIDING)])
def test_fused_on_a_gpu_in_bfloat16(layer_types):
    config = dataclasses.replace(PLAIN, layer_types=layer_types, window=9, head_dim=64)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 128, 2, *g, 64)), jnp.bfloat16) for g in ((3,), (), ()))
    for is_sliding in [kind == SLIDING for kind in layer_types]:

        def gradient(kind, s=is_sliding):
            return jax.jit(
                jax.vmap(
                    jax.grad(
                        lambda q, k, v: attend_causal(q, k, v, config, s, kind).astype(jnp.float32).sum(),
                        argnums=(0, 1, 2),
                    )
                )
            )

        for a, b in zip(gradient("fused")(q, k, v), gradient("dense")(q, k, v), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.05)


@pytest.mark.gpu
def test_a_gpu_takes_its_kernel_where_it_has_one():
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in problem(64))
    taken = jax.make_jaxpr(lambda *x: attend_causal(*x, PLAIN, False, "auto"))(q, k, v)
    assert "cudnn" in str(taken)
    capped = dataclasses.replace(PLAIN, attention_cap=30.0)
    assert "cudnn" not in str(jax.make_jaxpr(lambda *x: attend_causal(*x, capped, False, "auto"))(q, k, v))


def test_fused_refuses_what_it_cannot_express():
    config = dataclasses.replace(PLAIN, attention_cap=2.0)
    with pytest.raises(ValueError, match="soft-caps"):
        attend_causal(*problem(8)[:3], config, False, "fused")


def test_blockwise_works_per_example():
    config = dataclasses.replace(PLAIN, window=50)
    q, k, v, d = problem(300)

    def gradient(kind):
        return jax.jit(
            jax.vmap(
                jax.grad(lambda q, k, v, d: (attend_causal(q, k, v, config, True, kind) * d).sum(), argnums=(0, 1, 2))
            )
        )

    for a, b in zip(gradient("blockwise")(q, k, v, d), gradient("dense")(q, k, v, d), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind, quadratic", [("dense", True), ("blockwise", False)])
def test_memory_at_full_context(kind, quadratic):
    # Doubling the length doubles the memory of tiles, and quadruples that of all scores.
    def temporary(length):
        q, k, v, d = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem(length))
        return value_and_gradients(PLAIN, kind).lower(q, k, v, d, False).compile().memory_analysis().temp_size_in_bytes

    growth = temporary(4096) / temporary(2048)
    assert (growth > 3.5) if quadratic else (growth < 2.2)


@pytest.mark.parametrize("before, after", [(700, 700), (90, 300), (257, 1)])
def test_a_mask_that_looks_ahead_is_the_same_in_tiles(before, after):
    """Encoders see what follows: the mask is an argument, and no way of attention takes causality for granted."""
    q, k, v, cotangent = problem(700)
    config, mask = dataclasses.replace(PLAIN, max_length=1024), masks.Window(jnp.int32(before), after)
    results = []
    for kind in ("dense", "blockwise"):
        out, pull = jax.vjp(lambda q, k, v, kind=kind: attention.attend(q, k, v, mask, config, False, kind), q, k, v)
        results.append((out, *pull(cotangent)))
    t, s = np.arange(700)[:, None], np.arange(700)
    np.testing.assert_array_equal(mask.visible(t, s, 700), (s - t <= after) & (t - s < before))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * max(1, np.abs(b).max()))


def test_fused_attention_refuses_a_mask_that_looks_ahead():
    mask = masks.Window(jnp.int32(8), after=8)
    with pytest.raises(ValueError, match="causal"):
        attention.attend(*problem(8)[:3], mask, PLAIN, False, "fused")
