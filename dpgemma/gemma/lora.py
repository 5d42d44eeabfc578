"""Low-rank adapters: which parameters are trained, how adapters are folded into the weights, and PEFT's files.

Formal guarantee: `split` sorts every parameter into exactly one of two trees, and where a model has adapters the
trainable one holds their matrices and nothing else. The trainer differentiates, clips and noises that tree alone, so
frozen weights are a function of the public checkpoint. Tested by
tests/training/lora_test.py::test_pitfall_20_exactly_the_adapters_are_clipped_and_noised.
"""

import json
import pathlib
import re

import numpy as np
from safetensors.numpy import save_file

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig, Lora
from dpgemma.gemma.files import weights
from dpgemma.gemma.files.weights import LINEAR, Weight

# Linear layers that may get an adapter, by their names in Hugging Face files.
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECURRENT_TARGETS = ("linear_x", "linear_y", "linear_out")
ALL = "all"

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_MATRICES = ("lora_a", "lora_b")
_PEFT = {"lora_a": "lora_A", "lora_b": "lora_B"}
_PEFT_PREFIX = "base_model.model."
# Where the text tower of a multimodal model lies in memory, which is what PEFT's names follow.
_TEXT_TOWER = "language_model."


def adapters(config: GemmaConfig, rank: int, alpha: float, targets: str) -> Lora:
    """The adapters that `lora_rank`, `lora_alpha` and `lora_targets` ask for.

    Args:
      targets: names separated by commas, or "all" for every linear layer of the blocks.

    Raises:
      InputError: a layer that this model does not have, or a rank or scale below what makes sense.
    """
    known = ATTENTION_TARGETS + (RECURRENT_TARGETS if config.recurrent_layers else ())
    names = known if targets == ALL else tuple(name.strip() for name in targets.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"`lora_targets`={targets} names no linear layer of this model: use {ALL}, or some of {','.join(known)}"
        )
    if rank < 1 or not 0 < alpha < float("inf"):
        raise InputError(f"`lora_rank` must be at least 1 and `lora_alpha` positive, got {rank} and {alpha:g}")
    return Lora(rank, alpha, names)


def split(config: GemmaConfig, parameters: dict) -> tuple[dict, dict]:
    """(trainable, frozen) parameter trees; without adapters all are trainable."""
    leaves = weights.leaves(parameters)
    if config.lora is None:
        return parameters, {}
    trainable = {path: leaf for path, leaf in leaves.items() if path[-1] in _MATRICES}
    frozen = {path: leaf for path, leaf in leaves.items() if path[-1] not in _MATRICES}
    return weights.tree_of(trainable), weights.tree_of(frozen)


def join(trainable: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    return weights.tree_of(weights.leaves(frozen) | weights.leaves(trainable)) if frozen else trainable


def fold(config: GemmaConfig, parameters: dict) -> dict:
    """Parameters without adapters that compute the same: W + (alpha / rank) A B in float32, layer by layer."""
    leaves = weights.leaves(parameters)
    scale = config.lora.alpha / config.lora.rank
    folded = {}
    for path, leaf in leaves.items():
        if path[-1] in _MATRICES:
            continue
        folded[path] = leaf
        a, b = (leaves.get((*path[:-1], name)) for name in _MATRICES)
        if path[-1] == "w" and a is not None:
            result = np.empty(leaf.shape, np.float32)
            for i in range(len(result)):
                rank = a.shape[-1]
                product = np.asarray(a[i], np.float32).reshape(-1, rank) @ np.asarray(b[i], np.float32).reshape(
                    rank, -1
                )
                result[i] = np.asarray(leaf[i], np.float32) + scale * product.reshape(result[i].shape)
            folded[path] = result
    return weights.tree_of(folded)


def _table(config: GemmaConfig) -> list[Weight]:
    """PEFT's names of the adapters' matrices."""
    shapes = weights.leaves(decoder.parameter_shapes(config))
    return [
        Weight((*w.path[:-1], here), _PEFT_PREFIX + w.name.removesuffix("weight") + f"{there}.weight", LINEAR)
        for w in weights.table(config)
        for here, there in _PEFT.items()
        if w.path[-1] == "w" and (*w.path[:-1], here) in shapes
    ]


def _fan_in(weight: Weight, shape: tuple[int, ...]) -> int:
    return shape[0] if weight.path[-1] == "lora_b" else int(np.prod(shape[:-1]))


def save_peft(
    config: GemmaConfig, trainable: dict, directory: pathlib.Path, base: str, *, multimodal: bool = False
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
      base: name or path of the model that the adapters belong to.
      multimodal: whether that model has other towers beside the text decoder, which get no adapters.
    """
    leaves, tensors = weights.leaves(trainable), {}
    for weight in _table(config):
        for i, array in zip(
            weights.layers_of(config, weight), np.asarray(leaves[weight.path], np.float32), strict=True
        ):
            name = weight.name.replace(".model.layers", f".model.{_TEXT_TOWER}layers") if multimodal else weight.name
            tensors[name.format(i)] = weights.to_file(array, weight, _fan_in(weight, array.shape))
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    lora = config.lora
    targets = rf".*{re.escape(_TEXT_TOWER)}.*\.({'|'.join(lora.targets)})" if multimodal else list(lora.targets)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
