import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from accounting.errors import InputError
from dpgemma import cli
from dpgemma.gemma import decoder
from dpgemma.gemma.families import FAMILIES as known_families
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import tensor_files, weights
from dpgemma.gemma.presets import PRESETS
from tests.gemma import families
from tests.gemma.families import FAMILIES, IDS, our_logits
from tests.gemma.hf_models import directory, imported, multimodal_model, torch_logits, torch_model

pytestmark = pytest.mark.usefixtures("quick_compiles")


def files(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def copy_with(source, target, change=lambda tensors: None, settings=lambda config: None):
    """A copy of a directory with other tensors or settings."""
    target.mkdir(exist_ok=True)
    tensors, config = files(source), json.loads((source / "config.json").read_text())
    change(tensors)
    settings(config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def in_bfloat16(source, target):
    def change(tensors):
        tensors.update({name: tensor.astype(bfloat16) for name, tensor in tensors.items()})

    return copy_with(source, target, change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_identical_and_loads_in_transformers(name, dtype, tmp_path):
    source = directory(name) if dtype == "float32" else in_bfloat16(directory(name), tmp_path / "half")
    assert cli.main(["export", f"--init_from={source}", f"--out={tmp_path / 'out'}"]) == 0
    before, after = files(source), files(tmp_path / "out")
    assert set(before) == set(after)
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype == np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
        np.testing.assert_array_equal(before[tensor].view(np.uint8), after[tensor].view(np.uint8))
    assert "No differentially private training was done here" in (tmp_path / "out" / "README.md").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    ).eval()
    if dtype == "float32":
        np.testing.assert_array_equal(torch_logits(loaded), torch_logits(torch_model(name)))
    config, params = hf_config.read(tmp_path / "out"), weights.load(hf_config.read(tmp_path / "out"), tmp_path / "out")
    ours = our_logits(config, params)
    np.testing.assert_allclose(ours, torch_logits(loaded), atol=2e-5, rtol=0)


def test_shards_and_their_index(tmp_path):
    config, params = imported("gemma3")
    weights.save(config, params, tmp_path, shard_bytes=60_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 70_000 for name in shards)
    index = json.loads((tmp_path / tensor_files.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in files(tmp_path).values())
    again = weights.load(config, tmp_path)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    (tmp_path / "config.json").write_text((directory("gemma3") / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    np.testing.assert_array_equal(torch_logits(loaded), torch_logits(torch_model("gemma3")))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(InputError, match=shards[1]):
        weights.load(config, tmp_path)


def test_a_text_tower_is_found_inside_a_multimodal_file(tmp_path):
    text = {**FAMILIES["gemma3"][1], "model_type": "gemma3_text"}
    model = multimodal_model(text)
    model.save_pretrained(tmp_path)
    assert any(name.startswith("language_model.model.") for name in files(tmp_path))
    config = hf_config.read(tmp_path)
    params = weights.load(config, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(IDS, dtype=torch.long), use_cache=False).logits.numpy()
    ours = our_logits(config, params)
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)


def test_a_padded_vocabulary_is_sliced(tmp_path):
    def pad(tensors):
        tensors[weights.EMBEDDING] = np.concatenate([tensors[weights.EMBEDDING], np.ones((31, 32), np.float32)])

    config, params = imported("gemma2")
    got = weights.load(config, copy_with(directory("gemma2"), tmp_path / "padded", pad))
    np.testing.assert_array_equal(got["embedder"]["embedding"], params["embedder"]["embedding"])


def rename(tensors):
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")


def transpose(tensors):
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            r"missing model\.layers\.2\.mlp\.up_proj\.weight;"
            r" superfluous nothing",
        ),
        (lambda t: t.update({"model.extra": np.zeros(3, np.float32)}), r"missing nothing; superfluous model\.extra"),
        (rename, r"missing model\.layers\.0\.mlp\.gate_proj\.weight; superfluous model\.layers\.0\.mlp\.gate\.weight"),
        (transpose, r"model\.layers\.2\.mlp\.down_proj\.weight has shape \(48, 32\).*\(32, 48\)"),
        (lambda t: t.update({"lm_head.weight": t[weights.EMBEDDING] + 1}), "differs from the embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    config, _ = imported("gemma2")
    with pytest.raises(InputError, match=message):
        weights.load(config, copy_with(directory("gemma2"), tmp_path, change))


def test_a_tied_head_in_the_file_is_no_surplus(tmp_path):
    config, _ = imported("gemma2")
    weights.load(
        config, copy_with(directory("gemma2"), tmp_path, lambda t: t.update({"lm_head.weight": t[weights.EMBEDDING]}))
    )


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not json........"])
def test_damaged_files_are_one_sentence(content, tmp_path):
    config, _ = imported("gemma2")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        weights.load(config, tmp_path)
    with pytest.raises(InputError, match="neither"):
        weights.load(config, tmp_path / "nowhere")


def test_weights_arrive_in_the_meshs_sharding(tmp_path):
    # In a process of its own, with four devices, one of them reading a half of every other axis.
    code = f"""
import pathlib, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import weights
directory = pathlib.Path({str(directory("gemma2"))!r})
config = hf_config.read(directory)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
whole = weights.leaves(weights.load(config, directory))
def placed(path, leaf):
    axes = [name if size % 2 == 0 else None for size, name in zip(leaf.shape, ["a", None, "b", None])]
    return NamedSharding(mesh, PartitionSpec(*axes) if path[-1] in ("embedding", "w") else PartitionSpec())
shardings = dict((path, placed(path, leaf)) for path, leaf in whole.items())
parts = weights.leaves(weights.load(config, directory, weights.tree_of(shardings)))
for path, leaf in whole.items():
    assert parts[path].sharding == shardings[path] and np.array_equal(parts[path], leaf), path
print("fine")
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("name, config", PRESETS.items())
def test_presets_and_their_files_describe_the_same_model(name, config, tmp_path):
    content = hf_config.to_hf_config(config, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}, "bfloat16")
    assert hf_config.from_hf_config(json.loads(json.dumps(content))) == config
    # What transformers makes of the file, and writes itself, is the same model again.
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert hf_config.read(tmp_path / "again") == config
    # And no weights are needed to see that the shapes agree.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    assert sum(p.numel() for p in model.parameters()) == decoder.num_parameters(config)
    shapes = weights.leaves(decoder.parameter_shapes(config))
    for weight in weights.table(config):
        layers = weights.layers_of(config, weight)
        shape = shapes[weight.path].shape[1:] if layers else shapes[weight.path].shape
        wanted = weights.file_shape(shape, weight, weights.fan_in(weight, shape))
        assert tuple(model.state_dict()[weight.name.format(layers[-1] if layers else 0)].shape) == wanted


def test_files_that_leave_values_out_are_completed_by_the_published_model_or_refused():
    # google/gemma-3-4b's text_config says no more than this.
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        sliding_window=1024,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
    assert (
        hf_config.from_hf_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
        == PRESETS["gemma3_4b"]
    )
    published = hf_config.to_hf_config(PRESETS["vaultgemma_1b"], {})
    silent = {
        k: v
        for k, v in published.items()
        if k not in ("layer_types", "attn_logit_softcapping", "final_logit_softcapping")
    }
    assert hf_config.from_hf_config(silent) == PRESETS["vaultgemma_1b"]
    with pytest.raises(InputError, match=r"does not determine attention_cap, final_cap, layer_types"):
        hf_config.from_hf_config({**silent, "hidden_size": 1024})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "recurrent_gemma"])
def test_old_spellings_mean_the_same(name):
    content = json.loads((directory(name) / "config.json").read_text())
    expected = hf_config.from_hf_config(content)
    nested = content.pop("rope_parameters")
    if name == "gemma3":
        content |= {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
        del content["layer_types"]
        content["sliding_window_pattern"] = 6
    else:
        content["rope_theta"] = nested["rope_theta"]
    if name.startswith("gemma") and "hidden_act" in content:
        content["hidden_act"] = "gelu"
    assert hf_config.from_hf_config(content) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"hidden_activation": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": "wide"}, "d_model must be a positive whole number"),
        ({"hidden_size": 32.0}, "d_model must be a positive whole number"),
        ({"rms_norm_eps": "1e-6"}, "norm_eps"),
        ({"final_logit_softcapping": [30]}, "soft-caps must be positive numbers"),
        ({"attn_logit_softcapping": 0.0}, "soft-caps must be positive numbers"),
        ({"num_hidden_layers": None, "layer_types": None}, "wrong kind"),
        ({"num_hidden_layers": 10**30, "layer_types": None}, "wrong kind"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None),
    ],
)
def test_other_architectures_are_refused(changes, message, tmp_path):
    content = json.loads((directory("gemma2") / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    if message is None:  # it can be read, but no file of this family could be written
        assert (
            cli.main(["train", f"--init_from={tmp_path}", "--sequence_length=8", f"--workdir={tmp_path / 'run'}"]) == 2
        )
        assert not (tmp_path / "run").exists()
        return
    with pytest.raises(InputError, match=message):
        hf_config.read(tmp_path)


def test_a_missing_key_and_a_missing_file_are_named(tmp_path):
    content = json.loads((directory("recurrent_gemma") / "config.json").read_text())
    del content["block_types"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="lacks 'block_types'"):
        hf_config.read(tmp_path)
    with pytest.raises(InputError, match="no Hugging Face directory"):
        hf_config.read(tmp_path / "config.json")


def test_a_decoder_that_no_file_can_express_is_not_written():
    config = dataclasses.replace(imported("gemma2")[0], qk_norm=True)
    with pytest.raises(InputError, match="cannot express"):
        hf_config.to_hf_config(config, {})


def test_families_are_what_transformers_names():
    assert {families.FAMILIES[name][0] for name in FAMILIES} == set(known_families)
