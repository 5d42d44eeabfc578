"""Adapters in the files of PEFT."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.family import LINEAR, Weight
from dpgemma.gemma.files import tensor_files, weights

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_PREFIX = "base_model.model."
# Where the text tower of a multimodal model lies in memory, which is what PEFT's names follow.
_TEXT_TOWER = "language_model."


def _table(config: GemmaConfig) -> list[Weight]:
    """PEFT's names of the adapters' matrices."""
    shapes, axes = weights.leaves(decoder.parameter_shapes(config)), weights.leaves(weights.axes(config))
    return [
        Weight(path, f"{_PREFIX}{w.name.removesuffix('weight')}{there}.weight", axes[path], LINEAR)
        for w in weights.table(config)
        for here, there in _NAMES.items()
        if w.path[-1] == "w" and (path := (*w.path[:-1], here)) in shapes
    ]


def _fan_in(weight: Weight, shape: tuple[int, ...]) -> int:
    return shape[0] if weight.path[-1] == "lora_b" else int(np.prod(shape[:-1]))


def save_peft(
    config: GemmaConfig, trainable: dict[str, Any], directory: pathlib.Path, base: str, *, multimodal: bool = False
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
    tensor_files.save(tensors, directory / ADAPTER_FILE)
    lora = config.lora
    assert lora is not None
    targets = rf".*{re.escape(_TEXT_TOWER)}.*\.({'|'.join(lora.targets)})" if multimodal else list(lora.targets)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
