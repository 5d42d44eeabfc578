import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpgemma.gemma import decoder
from dpgemma.gemma.blocks import attention, layers, recurrent
from dpgemma.gemma.config import Rope
from dpgemma.gemma.files import weights
from dpgemma.objectives import cross_entropy as loss
from tests.gemma.families import FAMILIES, IDS, our_logits
from tests.gemma.hf_models import imported, torch_logits, torch_model

pytestmark = pytest.mark.usefixtures("quick_compiles")


def uncompiled_logits(config, params, **options):
    return decoder.logits(config, params, decoder.hidden_states(config, params, IDS, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name):
    config, params = imported(name)
    expected = torch_logits(torch_model(name))
    assert 0.5 < np.abs(expected).max() < 10
    kinds = ["dense", "blockwise"] if config.attention_cap else ["dense", "blockwise", "fused"]
    for kind in kinds:
        np.testing.assert_allclose(our_logits(config, params, attention=kind), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "recurrent_gemma" else ()) for name in FAMILIES]
)
def test_per_example_gradients_equal_torch(name):
    (config, params), model = imported(name), torch_model(name)

    def row_loss(params, row):
        hidden = decoder.hidden_states(config, params, row[:-1])
        return loss.cross_entropy(hidden, params["embedder"]["embedding"], row[1:], final_cap=config.final_cap).sum()

    ours = jax.jit(jax.vmap(jax.grad(row_loss), (None, 0)))(params, IDS)
    for i, row in enumerate(torch.tensor(IDS, dtype=torch.long)):
        model.zero_grad()
        logits = model(row[None, :-1], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        expected = {n: p.grad.numpy() for n, p in model.named_parameters()}
        got = dict(weights.tensors(config, jax.tree.map(lambda leaf, i=i: leaf[i], ours)))
        assert set(got) == set(expected)
        for tensor, gradient in expected.items():
            assert np.linalg.norm(got[tensor] - gradient) <= 1e-4 * np.linalg.norm(gradient) > 0, tensor


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma"])
def test_bfloat16_is_as_close_to_transformers_as_its_rounding(name):
    config, params = imported(name)
    exact = torch_logits(torch_model(name))
    theirs = torch_model(name)
    half = type(theirs)(theirs.config).to(torch.bfloat16).eval()
    half.load_state_dict(theirs.state_dict())
    rounded = torch_logits_bfloat16(half)
    ours = jax.jit(lambda params: uncompiled_logits(config, params, dtype=jnp.bfloat16))(params)
    noise = np.abs(rounded - exact).mean()
    assert np.abs(ours - exact).mean() < 2 * noise and np.abs(ours - rounded).mean() < 2 * noise


def torch_logits_bfloat16(model):
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long), use_cache=False).logits.float().numpy()


def without(params, stack, names):
    """The parameters without the named parts of a block."""
    kept = {path: leaf for path, leaf in weights.leaves(params).items() if not set(path) & set(names)}
    return weights.tree_of(kept)


def changed(params, *path, by):
    leaves = weights.leaves(params)
    return weights.tree_of({p: by(leaf) if p[-len(path) :] == path else leaf for p, leaf in leaves.items()})


def replaced(**fields):
    return lambda c, p, _: (dataclasses.replace(c, **fields), p)


def patched(module, name, function):
    def mutate(config, params, monkeypatch):
        monkeypatch.setattr(module, name, function)
        return config, params

    return mutate


def interleaved(x, angles):
    x = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = x[..., 0], x[..., 1]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(*x.shape[:-2], -1)


def kv_tiled(config, params, _):
    heads = np.arange(config.num_heads).reshape(-1, config.num_kv_heads).T.ravel()
    params = changed(params, "mixer", "q", "w", by=lambda w: w[:, :, heads])
    return config, changed(params, "mixer", "out", "w", by=lambda w: w[:, heads])


def heads_swapped(config, params, _):
    return config, changed(
        params, "mixer", "out", "w", by=lambda w: jnp.swapaxes(w.reshape(w.shape[0], w.shape[2], w.shape[1], -1), 1, 2)
    )


def unscaled(embedder, tokens, dtype):
    return embedder.embedding[...][tokens].astype(dtype)


GELU = jax.nn.gelu
MUTATIONS = {
    "window_minus_1": (
        lambda c, p, _: (dataclasses.replace(c, window=c.window - 1), p),
        ["vaultgemma_capped", "gemma2", "gemma3"],
    ),
    "window_plus_1": (
        lambda c, p, _: (dataclasses.replace(c, window=c.window + 1), p),
        ["vaultgemma_capped", "gemma2", "gemma3"],
    ),
    "w_instead_of_1_plus_w": (lambda c, p, _: (c, changed(p, "scale", by=lambda w: w - 1)), list(FAMILIES)),
    "exact_gelu": (patched(jax.nn, "gelu", lambda x, approximate: GELU(x, approximate=False)), list(FAMILIES)),
    "no_embedding_scale": (patched(layers.Embedder, "encode", unscaled), list(FAMILIES)),
    "bfloat16_embedding_scale": (
        lambda c, p, _: (dataclasses.replace(c, bfloat16_scale=not c.bfloat16_scale), p),
        list(FAMILIES),
    ),
    "interleaved_rope": (patched(attention, "rotate", interleaved), [f for f in FAMILIES if f != "recurrent_gemma"]),
    "no_attention_cap": (replaced(attention_cap=None), ["vaultgemma_capped", "gemma2"]),
    "no_final_cap": (replaced(final_cap=None), ["vaultgemma_capped", "gemma2", "recurrent_gemma"]),
    "scaled_by_head_dim": (lambda c, p, _: (dataclasses.replace(c, query_scalar=c.head_dim), p), ["gemma2", "gemma3"]),
    "no_post_norms": (
        lambda c, p, _: (
            dataclasses.replace(c, post_norms=False),
            without(p, "blocks", ["post_mixer_norm", "post_ffw_norm"]),
        ),
        ["gemma2", "gemma3"],
    ),
    "no_qk_norm": (
        lambda c, p, _: (dataclasses.replace(c, qk_norm=False), without(p, "blocks", ["q_norm", "k_norm"])),
        ["gemma3"],
    ),
    "rope_factor_ignored": (replaced(rope_full=Rope(1e6)), ["gemma3"]),
    "one_rope_for_all_layers": (lambda c, p, _: (dataclasses.replace(c, rope_sliding=c.rope_full), p), ["gemma3"]),
    "eps_1e-5": (replaced(norm_eps=1e-5), ["gemma3"]),
    "output_heads_swapped": (heads_swapped, list(FAMILIES)),
    "kv_tiled": (kv_tiled, ["vaultgemma", "vaultgemma_capped", "gemma2", "gemma3"]),
    "convolution_reversed": (
        lambda c, p, _: (c, changed(p, "conv", "w", by=lambda w: w[..., ::-1])),
        ["recurrent_gemma"],
    ),
    "rope_on_the_whole_head": (replaced(rope_full=Rope(), rope_sliding=Rope()), ["recurrent_gemma"]),
    "recurrence_sharpness": (patched(recurrent, "_SHARPNESS", 7.0), ["recurrent_gemma"]),
    "unnormalised_recurrence": (patched(recurrent, "_bounded_sqrt", lambda x: x), ["recurrent_gemma"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation, name", [(m, name) for m, (_, names) in MUTATIONS.items() for name in names])
def test_every_mutation_would_be_noticed(mutation, name, monkeypatch):
    config, params = MUTATIONS[mutation][0](*imported(name), monkeypatch)
    difference = np.abs(uncompiled_logits(config, params) - torch_logits(torch_model(name))).max()
    assert difference > 3e-5  # and the tests above allow 2e-5


def test_the_bounded_square_root_shows_in_gradients(monkeypatch):
    # Where the gate is almost closed, 1 - a^2 is tiny and the true derivative is above 1000.
    x = jnp.array([1e-9, 1e-3])
    bounded = jax.grad(lambda x: recurrent._bounded_sqrt(x).sum())(x)
    t = torch.tensor([1e-9, 1e-3], requires_grad=True)
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative

    SqrtBoundDerivative.apply(t).sum().backward()
    np.testing.assert_allclose(bounded, t.grad.numpy(), rtol=1e-6)
    assert bounded[0] == pytest.approx(1000)
