import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dpgemma.gemma import decoder, loss, weights
from dpgemma.gemma.config import FULL, PRESETS, SLIDING, GemmaConfig
from dpgemma.gemma.hf_config import to_hf_config

COMMON = dict(vocab_size=97, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48, max_length=64, query_scalar=16)
PLAIN = GemmaConfig(**COMMON, layer_types=(FULL,) * 4, window=8)
CAPPED = GemmaConfig(**COMMON, layer_types=(SLIDING, FULL) * 2, window=5, attention_cap=2.0, final_cap=3.0)


@functools.lru_cache
def torch_model(config: GemmaConfig):
    """transformers' own model of this configuration, eager attention, float32, weights of order one."""
    hf = transformers.VaultGemmaConfig(**{k: v for k, v in to_hf_config(config).items() if k not in ("torch_dtype", "dtype")})
    hf._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.VaultGemmaForCausalLM(hf).to(torch.float32).eval()
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5
        parameter.data = scale * torch.randn(parameter.shape)
    return model


def imported(config):
    tensors = {n: p.detach().numpy() for n, p in torch_model(config).named_parameters()}
    return weights.from_hf(config, tensors)


IDS = np.random.default_rng(0).integers(3, 90, (2, 19)).astype(np.int32)


@pytest.mark.parametrize("config", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_logits_equal_transformers(config):
    with torch.no_grad():
        expected = torch_model(config)(torch.tensor(IDS, dtype=torch.long), use_cache=False).logits.numpy()
    params = imported(config)
    got = decoder.logits(config, params, decoder.hidden_states(config, params, IDS))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_per_example_gradients_equal_torch(config):
    params, model = imported(config), torch_model(config)

    def row_loss(params, row):
        hidden = decoder.hidden_states(config, params, row[:-1])
        return loss.cross_entropy(hidden, params["embedder"]["embedding"], row[1:], final_cap=config.final_cap).sum()

    ours = jax.jit(jax.vmap(jax.grad(row_loss), (None, 0)))(params, IDS)
    for i, row in enumerate(torch.tensor(IDS, dtype=torch.long)):
        model.zero_grad()
        logits = model(row[None, :-1], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        expected = {n: p.grad.numpy() for n, p in model.named_parameters()}
        got = weights.to_hf(config, jax.tree.map(lambda leaf, i=i: leaf[i], ours))
        for name, gradient in expected.items():
            assert np.linalg.norm(got[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name


def test_parameter_counts():
    assert decoder.count_parameters(PRESETS["vaultgemma_1b"]) == 1_038_741_120
    assert 200_000 <= decoder.count_parameters(PRESETS["tiny"]) <= 1_000_000


def test_names_and_shapes_are_the_checkpoints():
    names = {n: p.shape for n, p in torch_model(PLAIN).named_parameters()}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), decoder.parameter_shapes(PLAIN))
    exported = weights.to_hf(PLAIN, zeros)
    assert {n: tuple(s) for n, s in names.items()} == {n: a.shape for n, a in exported.items()}
    shapes = weights.to_hf(PRESETS["tiny"], decoder.init_parameters(PRESETS["tiny"], jax.random.key(0)))
    assert "lm_head.weight" not in shapes


def test_import_and_export_are_inverse():
    params = imported(CAPPED)
    tensors = weights.to_hf(CAPPED, params)
    for name, parameter in torch_model(CAPPED).named_parameters():
        np.testing.assert_array_equal(tensors[name], parameter.detach().numpy())


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_tensors_are_named(change):
    tensors = weights.to_hf(PLAIN, imported(PLAIN))
    if change == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight|lm_head\.weight"):
        weights.from_hf(PLAIN, tensors)


def test_a_position_depends_on_itself_and_the_past_only():
    config, params = CAPPED, imported(CAPPED)
    embedded = jax.nn.one_hot(IDS[0], 97) @ params["embedder"]["embedding"]

    def outputs(rows):
        # Feed rows of the embedding, so that the inputs are differentiable.
        table = {**params, "embedder": {"embedding": rows}}
        return decoder.hidden_states(config, table, jnp.arange(rows.shape[0])).sum(axis=-1)

    influence = np.abs(jax.jacobian(outputs)(embedded)).sum(axis=-1)
    assert np.triu(influence, 1).max() == 0
    assert np.diag(influence).min() > 0


def test_sliding_layers_see_exactly_their_window():
    config = dataclasses.replace(PLAIN, layer_types=(SLIDING,), window=5)
    params = jax.tree.map(lambda leaf: leaf, decoder.init_parameters(config, jax.random.key(0)))
    changed = IDS[0].copy()
    changed[3] = 55
    difference = np.abs(decoder.hidden_states(config, params, changed) - decoder.hidden_states(config, params, IDS[0])).max(axis=-1)
    assert np.flatnonzero(difference).tolist() == [3, 4, 5, 6, 7]


def test_remat_changes_nothing_but_memory():
    params = imported(CAPPED)
    total = lambda params, remat: decoder.hidden_states(CAPPED, params, IDS, remat=remat).sum()
    plain, remat = (jax.grad(total)(params, policy) for policy in decoder.REMAT_POLICIES)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_stays_close_and_keeps_float32_gradients():
    params = imported(PLAIN)
    exact = decoder.hidden_states(PLAIN, params, IDS)
    rough = decoder.hidden_states(PLAIN, params, IDS, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough - exact).mean()) < 0.03
    gradient = jax.grad(lambda p: decoder.hidden_states(PLAIN, p, IDS, dtype=jnp.bfloat16).astype(jnp.float32).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="context"):
        decoder.hidden_states(PLAIN, imported(PLAIN), np.zeros(65, np.int32))


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 3}, {"head_dim": 15}, {"layer_types": ()}, {"layer_types": ("global",)}]
)  # fmt: skip
def test_inconsistent_configurations_are_refused(changes):
    with pytest.raises(ValueError):
        dataclasses.replace(PLAIN, **changes)
