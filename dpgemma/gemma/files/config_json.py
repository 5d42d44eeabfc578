"""config.json of Hugging Face directories, read and written.

The class defaults of transformers are another model's, so nothing is ever taken from them: what a file leaves out comes
from the published model (a preset) that agrees with everything the file does say, or the file is refused. What is
written names every value, in the spelling of transformers 4 and of 5.
"""

import dataclasses
import json
import pathlib
from typing import Any

from accounting.errors import InputError
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.families import FAMILIES, family_of
from dpgemma.gemma.presets import PRESETS

FILE = "config.json"

# Keys that the files of all families have, and the fields that they stand for.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}
_WRAPPED = {family.wrapped_as: family for family in FAMILIES.values() if family.wrapped_as}


def read(directory: pathlib.Path) -> GemmaConfig:
    """The decoder that a directory's config.json describes.

    Raises:
      InputError: no such file, no JSON, or nothing that this program can run.
    """
    path = directory / FILE
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory} is no Hugging Face directory: it has no config.json") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON: download it again") from None
    try:
        return from_hf_config(content)
    except KeyError as error:
        raise InputError(f"{path} lacks {error}: add it") from None
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} holds a value of the wrong kind ({error}): download it again") from None


def is_multimodal(directory: pathlib.Path) -> bool:
    """Whether a directory holds more than a text decoder."""
    return json.loads((directory / FILE).read_text()).get("model_type") in _WRAPPED


def special_ids(directory: pathlib.Path) -> dict[str, Any]:
    """What a directory's config.json, or the text part of it, says of bos, eos and pad; eos may be a list."""
    content = json.loads((directory / FILE).read_text())
    content = {**content, **(content.get("text_config") or {})}
    return {
        name: content[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if content.get(name) is not None
    }


def from_hf_config(content: dict[str, Any]) -> GemmaConfig:
    """The decoder of a config.json; the text part of a multimodal one.

    Raises:
      InputError: another architecture, a switch that this decoder does not have, or a value that neither the file nor a
        preset gives.
    """
    wrapper = _WRAPPED.get(str(content.get("model_type")))
    if wrapper is not None:
        content = {"model_type": wrapper.model_type, **content["text_config"]}
    family = FAMILIES.get(str(content.get("model_type")))
    if family is None:
        known = ", ".join([*FAMILIES, *map(str, _WRAPPED)])
        raise InputError(f"model_type {content.get('model_type')!r} is not supported: use one of {known}")
    _refuse_other_switches(content, family.activations)
    given = {name: content[key] for key, name in (_SIZES | dict(family.keys)).items() if key in content}
    fields = given | family.read(content, given) | {"model_type": family.model_type}
    wanted = {field.name for field in dataclasses.fields(GemmaConfig) if field.name != "lora"} - set(family.fixed)
    missing = sorted(wanted - set(fields))
    if missing:
        fits = [p for p in PRESETS.values() if all(getattr(p, name) == value for name, value in fields.items())]
        if not fits or any(getattr(p, name) != getattr(fits[0], name) for p in fits for name in missing):
            raise InputError(
                f"it does not determine {', '.join(missing)}, and no published model agrees with the rest: add them"
            )
        fields |= {name: getattr(fits[0], name) for name in missing}
    return GemmaConfig(**family.fixed, **fields)


def _refuse_other_switches(content: dict[str, Any], activations: tuple[str, ...]) -> None:
    activation = content.get("hidden_activation") or content.get("hidden_act") or activations[0]
    if activation not in activations:
        raise InputError(f"activation {activation!r} is not supported: the Gemma models use {activations[0]}")
    for key, value in {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    }.items():
        if (content.get(key) if content.get(key) is not None else value) != value:
            raise InputError(f"{key}={content[key]} is not supported: the Gemma decoders have {value}")


def to_hf_config(config: GemmaConfig, special_ids: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json; adapters are not part of it.

    Args:
      special_ids: bos_token_id, eos_token_id and pad_token_id.
      dtype: type of the stored weights.

    Raises:
      InputError: a decoder that its family's file format cannot express.
    """
    c, family = config, family_of(config)
    names = {v: k for k, v in _SIZES.items()}
    content = {
        "architectures": [family.hf_class],
        "model_type": c.model_type,
        **{names[name]: getattr(c, name) for name in names},
        "num_hidden_layers": c.num_layers,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special_ids,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **family.write(c),
    }
    if from_hf_config(content) != dataclasses.replace(c, lora=None):
        raise InputError(f"the files of {c.model_type} cannot express this decoder: choose another model")
    return content
