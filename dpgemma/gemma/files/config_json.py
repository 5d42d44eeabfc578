"""config.json of Hugging Face directories, read and written.

The class defaults of transformers are another model's, so nothing is ever taken from them: what a file leaves out comes
from the published model (a preset) that agrees with everything the file does say, or the file is refused. What is
written names every value, in the spelling of transformers 4 and of 5.
"""

import dataclasses
import json
import pathlib

from accounting.errors import InputError
from dpgemma.gemma.config import FULL, RECURRENT, SLIDING, GemmaConfig, Rope
from dpgemma.gemma.presets import PRESETS

# Architectures and the text part of multimodal ones.
_CLASSES = {
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
}
_MULTIMODAL = "gemma3"

# Layer kinds that repeat where a family's files name none. VaultGemma's must.
_PERIODS = {"gemma": (FULL,), "gemma2": (SLIDING, FULL), "gemma3_text": (SLIDING,) * 5 + (FULL,)}

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
_SWITCHES = {
    "query_pre_attn_scalar": "query_scalar",
    "sliding_window": "window",
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "final_cap",
}
_RECURRENT_SWITCHES = {
    "attention_window_size": "window",
    "logits_soft_cap": "final_cap",
    "lru_width": "lru_width",
    "conv1d_width": "conv_width",
}
# RecurrentGemma's files name no context; the published models were trained on this one.
_RECURRENT_CONTEXT = 8192
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")  # "gelu" in Gemma 1's files is legacy and means the same


def read(directory: pathlib.Path) -> GemmaConfig:
    """The decoder that a directory's config.json describes.

    Raises:
      InputError: no such file, no JSON, or nothing that this program can run.
    """
    path = directory / "config.json"
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
    return json.loads((directory / "config.json").read_text()).get("model_type") == _MULTIMODAL


def special_ids(directory: pathlib.Path) -> dict:
    """What a directory's config.json, or the text part of it, says of bos, eos and pad; eos may be a list."""
    content = json.loads((directory / "config.json").read_text())
    content = {**content, **(content.get("text_config") or {})}
    return {
        name: content[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if content.get(name) is not None
    }


def from_hf_config(content: dict) -> GemmaConfig:
    """The decoder of a config.json; the text part of a multimodal one.

    Raises:
      InputError: another architecture, a switch that this decoder does not have, or a value that neither the file nor a
        preset gives.
    """
    if content.get("model_type") == _MULTIMODAL:
        content = {"model_type": "gemma3_text", **content["text_config"]}
    model_type = content.get("model_type")
    if model_type not in _CLASSES:
        raise InputError(f"model_type {model_type!r} is not supported: use one of {', '.join(_CLASSES)}, {_MULTIMODAL}")
    _refuse_other_switches(content)
    fields = _fields(model_type, content)
    wanted = {field.name for field in dataclasses.fields(GemmaConfig) if field.name != "lora"} - set(
        _family(model_type)
    )
    missing = sorted(wanted - set(fields))
    if missing:
        fits = [p for p in PRESETS.values() if all(getattr(p, name) == value for name, value in fields.items())]
        if not fits or any(getattr(p, name) != getattr(fits[0], name) for p in fits for name in missing):
            raise InputError(
                f"it does not determine {', '.join(missing)}, and no published model agrees with the rest: add them"
            )
        fields |= {name: getattr(fits[0], name) for name in missing}
    return GemmaConfig(**_family(model_type), **fields)


def _family(model_type: str) -> dict:
    """What the architecture's name alone decides."""
    recurrent = model_type == "recurrent_gemma"
    return {
        "qk_norm": model_type == "gemma3_text",
        "post_norms": model_type in ("gemma2", "gemma3_text"),
        "biases": recurrent,
        "bfloat16_scale": recurrent,
    }


def _refuse_other_switches(content: dict) -> None:
    activation = content.get("hidden_activation") or content.get("hidden_act") or _ACTIVATIONS[0]
    if activation not in _ACTIVATIONS or (activation == "gelu" and content["model_type"] != "gemma"):
        raise InputError(f"activation {activation!r} is not supported: the Gemma models use {_ACTIVATIONS[0]}")
    for key, value in {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    }.items():
        if (content.get(key) if content.get(key) is not None else value) != value:
            raise InputError(f"{key}={content[key]} is not supported: the Gemma decoders have {value}")


def _fields(model_type: str, content: dict) -> dict:
    """The fields that the file determines."""
    recurrent = model_type == "recurrent_gemma"
    switches = _RECURRENT_SWITCHES if recurrent else _SWITCHES
    fields = {name: content[key] for key, name in (_SIZES | switches).items() if key in content}
    fields["model_type"] = model_type
    if recurrent:
        # transformers stores twice the width of a feed-forward layer here, and no head width.
        fields["d_ff"] = content["intermediate_size"] // 2
        fields["head_dim"] = fields["d_model"] // fields["num_heads"]
        fields["lru_width"] = content.get("lru_width") or fields["d_model"]
        fields.setdefault("max_length", _RECURRENT_CONTEXT)
        fields["attention_cap"] = None
    else:
        fields |= {"lru_width": 0, "conv_width": 4}
    if model_type in ("gemma", "recurrent_gemma") and "head_dim" in fields:
        fields["query_scalar"] = fields["head_dim"]
    if model_type == "gemma" and "max_length" in fields:
        fields |= {"window": fields["max_length"], "attention_cap": None, "final_cap": None}
    if model_type == "gemma3_text":
        fields = {"attention_cap": None, "final_cap": None} | fields
    layer_types = _layer_types(model_type, content)
    if layer_types is not None:
        fields["layer_types"] = layer_types
    return fields | _ropes(model_type, content)


def _layer_types(model_type: str, content: dict) -> tuple[str, ...] | None:
    layers = content["num_hidden_layers"]
    if model_type == "recurrent_gemma":
        kinds = {"recurrent": RECURRENT, "attention": SLIDING}
        period = tuple(
            kinds[name] for name in content.get("block_types") or content.get("_block_types") or content["block_types"]
        )
    elif content.get("layer_types"):
        if len(content["layer_types"]) != layers:
            raise InputError(f"layer_types names {len(content['layer_types'])} layers, num_hidden_layers {layers}")
        return tuple(content["layer_types"])
    elif model_type == "gemma3_text" and content.get("sliding_window_pattern"):
        period = (SLIDING,) * (content["sliding_window_pattern"] - 1) + (FULL,)
    elif model_type in _PERIODS:
        period = _PERIODS[model_type]
    else:
        return None
    return (period * layers)[:layers]


def _ropes(model_type: str, content: dict) -> dict:
    """Both rotary embeddings, as far as the file determines them."""
    nested = content.get("rope_parameters") or {}
    share = (
        content.get("partial_rotary_factor", nested.get("partial_rotary_factor", 0.5))
        if model_type == "recurrent_gemma"
        else 1.0
    )
    if model_type != "gemma3_text":
        stated = {**(content.get("rope_scaling") or {}), **nested}
        stated.setdefault("rope_theta", content.get("rope_theta"))
        rope = _rope(stated, share)
        return {} if rope is None else {"rope_full": rope, "rope_sliding": rope}
    full = dict(nested.get(FULL) or content.get("rope_scaling") or {})
    full.setdefault("rope_theta", content.get("rope_theta"))
    sliding = dict(nested.get(SLIDING) or {})
    sliding.setdefault("rope_theta", content.get("rope_local_base_freq"))
    ropes = {"rope_full": _rope(full, share), "rope_sliding": _rope(sliding, share)}
    return {name: rope for name, rope in ropes.items() if rope is not None}


def _rope(stated: dict, share: float) -> Rope | None:
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ("default", "linear"):
        raise InputError(f"rotary embedding of type {kind!r} is not supported: use default or linear")
    if stated.get("rope_theta") is None:
        return None
    return Rope(float(stated["rope_theta"]), float(stated["factor"]) if kind == "linear" else 1.0, float(share))


def to_hf_config(config: GemmaConfig, special_ids: dict, dtype: str = "float32") -> dict:
    """The content of config.json; adapters are not part of it.

    Args:
      special_ids: bos_token_id, eos_token_id and pad_token_id.
      dtype: type of the stored weights.

    Raises:
      InputError: a decoder that its family's file format cannot express.
    """
    c = config
    names = {v: k for k, v in _SIZES.items()}
    content = {
        "architectures": [_CLASSES[c.model_type]],
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
        **_family_keys(c),
    }
    if from_hf_config(content) != dataclasses.replace(c, lora=None):
        raise InputError(f"the files of {c.model_type} cannot express this decoder: choose another model")
    return content


def _family_keys(c: GemmaConfig) -> dict:
    def floats(cap):
        return None if cap is None else float(cap)

    plain = {
        "rope_theta": c.rope_full.theta,
        "rope_parameters": {"rope_theta": c.rope_full.theta, "rope_type": "default"},
    }
    if c.model_type == "gemma":
        return {"hidden_act": "gelu_pytorch_tanh", **plain}
    if c.model_type == "recurrent_gemma":
        period = ["recurrent" if kind == RECURRENT else "attention" for kind in c.layer_types]
        share = {"partial_rotary_factor": c.rope_full.share}
        return {
            "intermediate_size": 2 * c.d_ff,
            "attention_window_size": c.window,
            "logits_soft_cap": floats(c.final_cap),
            "lru_width": c.lru_width,
            "conv1d_width": c.conv_width,
            "block_types": period,
            **share,
            **plain,
            "rope_parameters": plain["rope_parameters"] | share,
        }
    switches = {
        "query_pre_attn_scalar": int(c.query_scalar),
        "sliding_window": c.window,
        "layer_types": list(c.layer_types),
        "attn_logit_softcapping": floats(c.attention_cap),
        "final_logit_softcapping": floats(c.final_cap),
    }
    if c.model_type != "gemma3_text":
        return switches | plain
    factor = c.rope_full.linear_factor
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    return switches | {
        "rope_theta": c.rope_full.theta,
        "rope_local_base_freq": c.rope_sliding.theta,
        "rope_scaling": scaling if factor != 1 else None,
        "rope_parameters": {
            FULL: {"rope_theta": c.rope_full.theta, **scaling},
            SLIDING: {"rope_theta": c.rope_sliding.theta, "rope_type": "default"},
        },
    }
