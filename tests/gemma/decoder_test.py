import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpgemma.gemma import decoder
from dpgemma.gemma.config import FULL, RECURRENT, SLIDING, GemmaConfig, Lora
from dpgemma.gemma.files import weights
from dpgemma.gemma.presets import PRESETS
from tests.gemma.families import our_logits

pytestmark = pytest.mark.usefixtures("quick_compiles")

COMMON = dict(
    vocab_size=97, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48, max_length=64, query_scalar=16
)
PLAIN = GemmaConfig(**COMMON, layer_types=(FULL,) * 4, window=8)
CAPPED = GemmaConfig(**COMMON, layer_types=(SLIDING, FULL) * 2, window=5, attention_cap=2.0, final_cap=3.0)
MIXED = GemmaConfig(**COMMON, layer_types=(RECURRENT, SLIDING), window=5, lru_width=32, biases=True)
IDS = np.random.default_rng(0).integers(3, 90, (2, 19)).astype(np.int32)

# Published sizes; the text parts of multimodal models, the tied embedding counted once.
PARAMETERS = {
    "vaultgemma_1b": 1_038_741_120,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "codegemma_2b": 2_506_172_416,
    "codegemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    "medgemma_4b": 3_880_263_168,
    "medgemma_27b": 27_009_346_304,
    "recurrentgemma_2b": 2_682_862_080,
    "recurrentgemma_9b": 8_579_977_216,
    "tiny": 246_624,
    # By hand: 260 d + layers (4 d^2 + 3 d f + 2 d) + d.
    "ladder_20k": 20_184,
    "ladder_45k": 44_964,
    "ladder_95k": 95_760,
    "ladder_200k": 205_632,
    "ladder_400k": 401_016,
    "ladder_850k": 845_712,
    "ladder_4m": 4_591_872,
    "ladder_11m": 11_606_400,
    "ladder_29m": 28_977_664,
    "ladder_41m": 41_080_896,
    "ladder_109m": 109_926_144,
    "ladder_335m": 335_729_664,
    "ladder_778m": 779_042_304,
}


def random_parameters(config):
    rng = np.random.default_rng(1)
    shapes = decoder.parameter_shapes(config)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def test_parameter_counts_are_the_published_ones():
    assert {name: decoder.num_parameters(config) for name, config in PRESETS.items()} == PARAMETERS


@pytest.mark.parametrize("vocab_size, name, parameters", [
    (262_144, "gemma3_4b", 3_880_099_328), (262_144, "gemma3_12b", 11_765_788_416),
    (262_144, "gemma3_27b", 27_009_002_240),
])  # fmt: skip
def test_parameter_counts_without_the_padding_of_multimodal_files(vocab_size, name, parameters):
    assert decoder.num_parameters(dataclasses.replace(PRESETS[name], vocab_size=vocab_size)) == parameters


@pytest.mark.parametrize("config", [CAPPED, MIXED], ids=["attention", "recurrent"])
def test_a_position_depends_on_itself_and_the_past_only(config):
    params = random_parameters(config)
    embedded = params["embedder"]["embedding"][IDS[0]]

    def outputs(rows):
        # Feed rows of the embedding, so that the inputs are differentiable.
        table = {**params, "embedder": {"embedding": rows}}
        return decoder.hidden_states(config, table, jnp.arange(rows.shape[0])).sum(axis=-1)

    influence = np.abs(jax.jit(jax.jacobian(outputs))(embedded)).sum(axis=-1)
    assert np.triu(influence, 1).max() == 0
    assert np.diag(influence).min() > 0


def test_sliding_layers_see_exactly_their_window():
    config = dataclasses.replace(PLAIN, layer_types=(SLIDING,), window=5)
    params = decoder.init_parameters(config, jax.random.key(0))
    changed = IDS[0].copy()
    changed[3] = 55
    difference = np.abs(
        decoder.hidden_states(config, params, changed) - decoder.hidden_states(config, params, IDS[0])
    ).max(axis=-1)
    assert np.flatnonzero(difference).tolist() == [3, 4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CAPPED, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["attention", "recurrent"]
)
def test_remat_changes_nothing_but_memory(config):
    params = random_parameters(config)

    def total(params, remat):
        return decoder.hidden_states(config, params, IDS, remat=remat).sum()

    plain, *others = (jax.jit(jax.grad(total), static_argnums=1)(params, policy) for policy in decoder.REMAT_POLICIES)
    for other in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.slow
def test_remat_policies_keep_less_for_the_backward_pass():
    config = dataclasses.replace(PLAIN, layer_types=(FULL,) * 8)
    params, rows = random_parameters(config), np.zeros((32, 64), np.int32)
    memory = []
    for policy in decoder.REMAT_POLICIES:
        gradient = jax.jit(
            jax.grad(lambda p, policy=policy: decoder.hidden_states(config, p, rows, remat=policy).sum())
        )
        memory.append(gradient.lower(params).compile().memory_analysis().temp_size_in_bytes)
    none, block, dots = memory
    assert block < dots < none


def test_bfloat16_compute_keeps_float32_gradients():
    params = random_parameters(PLAIN)

    def hidden(p):
        return decoder.hidden_states(PLAIN, p, IDS, dtype=jnp.bfloat16)

    assert jax.eval_shape(hidden, params).dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda p: hidden(p).astype(jnp.float32).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_adapters_start_as_nothing():
    config = dataclasses.replace(MIXED, lora=Lora(3, 6.0, ("q_proj", "o_proj", "up_proj", "linear_x")))
    adapted = decoder.init_parameters(config, jax.random.key(0))
    plain = {path: leaf for path, leaf in weights.leaves(adapted).items() if not path[-1].startswith("lora")}
    assert {path[-2] for path in set(weights.leaves(adapted)) - set(plain)} == {"q", "out", "up", "linear_x"}
    np.testing.assert_array_equal(our_logits(config, adapted, IDS), our_logits(MIXED, weights.tree_of(plain), IDS))


@pytest.mark.parametrize("options", [{"remat": "most"}, {"attention": "flash"}])
def test_unknown_ways_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        decoder.hidden_states(PLAIN, random_parameters(PLAIN), IDS, **options)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="context"):
        decoder.hidden_states(PLAIN, random_parameters(PLAIN), np.zeros(65, np.int32))


@pytest.mark.parametrize("changes", [
    {"num_kv_heads": 3}, {"head_dim": 15}, {"layer_types": ()}, {"layer_types": ("global",)}, {"d_ff": 0},
    {"model_type": "gpt2"},
    {"layer_types": (RECURRENT,)}, {"layer_types": (RECURRENT,), "lru_width": 30},
])  # fmt: skip
def test_inconsistent_configurations_are_refused(changes):
    with pytest.raises(ValueError):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize("config", [*PRESETS.values(), dataclasses.replace(CAPPED, lora=Lora(2, 4.0, ("q_proj",)))])
def test_a_configuration_survives_json(config):
    import json

    assert GemmaConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
