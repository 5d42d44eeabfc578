"""The tiny models of `families` as transformers builds, runs and saves them."""

import functools
import pathlib
import tempfile

import numpy as np
import torch
import transformers

from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import weights
from tests.gemma import families


def fill(model):
    """Gives every parameter the weight of its name."""
    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(families.tensor(name, tuple(parameter.shape)))
    return model.eval()


@functools.lru_cache
def torch_model(name: str):
    """A model with eager attention in float32."""
    model_type, settings = families.FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return fill(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32))


@functools.lru_cache
def directory(name: str) -> pathlib.Path:
    """The model as `save_pretrained` writes it."""
    path = pathlib.Path(tempfile.mkdtemp(prefix=f"dpgemma-{name}-"))
    torch_model(name).save_pretrained(path)
    return path


@functools.lru_cache
def imported(name: str):
    """(configuration, parameters) as dpgemma reads them from the directory."""
    config = hf_config.read(directory(name))
    return config, weights.load(config, directory(name))


def multimodal_model(text: dict):
    """A Gemma 3 with a text tower of these settings and a small vision tower."""
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, image_size=16,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    return fill(transformers.Gemma3ForConditionalGeneration(config).to(torch.float32))


def torch_logits(model, ids=families.IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long), use_cache=False).logits.numpy()


def load_torch(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
