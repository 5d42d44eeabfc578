"""Adapters: what is trained, clipped and noised, and PEFT's files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from accounting.errors import InputError
from accounting.mechanism import dp_sgd
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.config import Lora
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import peft as peft_files
from dpgemma.gemma.files import weights
from dpgemma.privacy import noise
from dpgemma.sharding import mesh
from dpgemma.training.step import TrainState, make_train_step
from tests import objectives as loss_lib
from tests.gemma.families import FAMILIES, IDS, our_logits
from tests.gemma.hf_models import directory, imported, multimodal_model, torch_logits

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEYS = noise.noise_keys(bytes(32), 0)
MECHANISM = dp_sgd(100, 4, 4, 0.8, 0.5, 10)


def adapted(name, targets="all", rank=3, alpha=6.0):
    """(configuration, trainable, frozen) with adapters of order one on both sides."""
    config, base = imported(name)
    config = dataclasses.replace(config, lora=lora.adapters(config, rank, alpha, targets))
    return config, random_adapters(config), base


def random_adapters(config):
    rng = np.random.default_rng(2)
    shapes, _ = lora.split(config, decoder.parameter_shapes(config))
    return jax.tree.map(lambda leaf: (0.15 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize(
    "name, targets", [("gemma2", "q_proj,v_proj"), pytest.param("recurrent_gemma", "all", marks=pytest.mark.slow)]
)
def test_pitfall_20_exactly_the_adapters_are_clipped_and_noised(name, targets):
    config, trainable, frozen = adapted(name, targets)
    tokens = np.concatenate([IDS, IDS[::-1]])
    batch, mask = {"tokens": tokens, "scored": np.ones(tokens.shape, bool)}, np.array([True, True, True, False])
    units = Batch.of_rows(batch, mask)
    loss = loss_lib.row_loss(config, bos=2, dtype=jnp.float32)
    optimizer = optax.sgd(1.0)
    step = make_train_step(loss_lib.causal(config, bos=2).loss, optimizer, MECHANISM, mesh.make("data:1"))
    before = jax.tree.map(np.array, frozen)
    start = jax.tree.map(np.array, trainable)
    state, stats = step(TrainState(trainable, optimizer.init(trainable)), frozen, units, KEYS)

    # The frozen weights are what they were, bit for bit, and the state holds nothing of them.
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {path[-1] for path in weights.leaves(state.parameters)} == {"lora_a", "lora_b"}
    # Norms are those of the adapters' gradients alone ...
    whole = lora.join(start, frozen)
    gradient = jax.jit(jax.grad(lambda p, row: loss(p, {}, row)))
    total = None
    for i in range(3):
        leaves = weights.leaves(gradient(whole, {key: column[i] for key, column in batch.items()}))
        of_adapters = weights.tree_of({path: leaf for path, leaf in leaves.items() if path[-1].startswith("lora")})
        np.testing.assert_allclose(stats.norms[i], norm(of_adapters), rtol=1e-4)
        assert norm(leaves) > 1.5 * norm(of_adapters)
        factor = min(1, 0.5 / norm(of_adapters))
        clipped = jax.tree.map(lambda g, factor=factor: factor * np.asarray(g, np.float64), of_adapters)
        total = clipped if total is None else jax.tree.map(np.add, total, clipped)
    # ... and every adapter's every number has its noise.
    shapes = [leaf.shape for leaf in jax.tree.leaves(start)]
    draws = jax.jit(lambda keys: [noise.standard_normal(keys, i, shape) for i, shape in enumerate(shapes)])(KEYS)
    for old, new, summed, draw in zip(*map(jax.tree.leaves, (start, state.parameters, total, draws)), strict=True):
        np.testing.assert_allclose(old - new, (summed + 0.8 * 0.5 * np.asarray(draw)) / 4, atol=2e-6)


def test_split_and_join_lose_nothing():
    config, trainable, frozen = adapted("gemma3")
    again = lora.split(config, lora.join(trainable, frozen))
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), again, (trainable, frozen)))
    plain = dataclasses.replace(config, lora=None)
    assert lora.split(plain, frozen) == (frozen, {}) and lora.join(frozen, {}) is frozen


@pytest.mark.parametrize(
    "name, targets",
    [
        *(
            pytest.param(name, "all", marks=() if name == "vaultgemma_capped" else pytest.mark.slow)
            for name in FAMILIES
        ),
        ("gemma3", "q_proj,o_proj,down_proj"),
    ],
)
def test_peft_loads_the_adapters_and_agrees(name, targets, tmp_path):
    if targets == "all" and name == "recurrent_gemma":
        targets = "q_proj,k_proj,linear_x,linear_y,linear_out,gate_proj"
    config, trainable, frozen = adapted(name, targets)
    peft_files.save_peft(config, trainable, tmp_path, str(directory(name)))
    ours = our_logits(config, lora.join(trainable, frozen))
    base = transformers.AutoModelForCausalLM.from_pretrained(directory(name), attn_implementation="eager")
    plain = torch_logits(base.eval())
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    loaded = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(loaded) == sum(len(leaf) for leaf in jax.tree.leaves(trainable))
    np.testing.assert_allclose(torch_logits(model), ours, atol=2e-5, rtol=0)
    assert np.abs(plain - ours).max() > 0.02


def test_peft_loads_adapters_of_a_text_tower(tmp_path):
    # In memory the tower lies deeper than in the file, and the vision tower has layers of the same names.
    model = multimodal_model({**FAMILIES["gemma3"][1], "model_type": "gemma3_text"})
    model.save_pretrained(tmp_path / "base")
    assert hf_config.is_multimodal(tmp_path / "base")
    config = hf_config.read(tmp_path / "base")
    config = dataclasses.replace(config, lora=lora.adapters(config, 3, 6.0, "all"))
    trainable = random_adapters(config)
    ours = our_logits(config, lora.join(trainable, weights.load(config, tmp_path / "base")))
    peft_files.save_peft(config, trainable, tmp_path, str(tmp_path / "base"), multimodal=True)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    assert not any("vision" in name for name, _ in loaded.named_parameters() if "lora_" in name)
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor(IDS, dtype=torch.long), use_cache=False).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "recurrent_gemma"))]
)
def test_folding_gives_the_same_function(name):
    config, trainable, frozen = adapted(name)
    parameters = lora.join(trainable, frozen)
    expected = our_logits(config, parameters)
    folded = jax.tree.map(jnp.asarray, lora.fold(config, parameters))
    plain = dataclasses.replace(config, lora=None)
    assert jax.tree.structure(folded) == jax.tree.structure(decoder.parameter_shapes(plain))
    np.testing.assert_allclose(our_logits(plain, folded), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rank, alpha, targets, message", [
    (4, 8.0, "q_proj,linear_x", "linear_x names no linear layer"),
    (4, 8.0, "", "names no linear layer"),
    (0, 8.0, "all", "at least 1"),
    (4, 0.0, "all", "positive"),
    (4, float("inf"), "all", "positive"),
])  # fmt: skip
def test_impossible_adapters_are_refused(rank, alpha, targets, message):
    with pytest.raises(InputError, match=message):
        lora.adapters(imported("gemma2")[0], rank, alpha, targets)


def test_all_means_every_linear_layer_of_a_block():
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert lora.adapters(imported("gemma2")[0], 2, 2.0, "all") == Lora(2, 2.0, attention)
    recurrent = {*attention, "linear_x", "linear_y", "linear_out"}
    assert set(lora.adapters(imported("recurrent_gemma")[0], 2, 2.0, "all").targets) == recurrent


def test_adapter_settings_are_pefts(tmp_path):
    config, trainable, _ = adapted("gemma2", rank=5, alpha=7.5)
    peft_files.save_peft(config, trainable, tmp_path, "some/model")
    settings = peft.LoraConfig.from_pretrained(tmp_path)
    assert (settings.r, settings.lora_alpha, settings.base_model_name_or_path) == (5, 7.5, "some/model")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    assert torch.float32 == next(iter(peft.load_peft_weights(str(tmp_path)).values())).dtype
