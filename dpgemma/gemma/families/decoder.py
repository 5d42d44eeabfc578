"""The families of attention decoders: VaultGemma, Gemma 1, 2 and 3."""

from typing import Any

from dpgemma.gemma.config import FULL, SLIDING, GemmaConfig
from dpgemma.gemma.family import Content, Family, Fields, as_float, layer_types, one_rope, plain_rope, rope

_PLAIN = {"qk_norm": False, "post_norms": False, "biases": False, "bfloat16_scale": False}
_SWITCHES = {
    "query_pre_attn_scalar": "query_scalar",
    "sliding_window": "window",
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "final_cap",
}
_NOT_RECURRENT = {"lru_width": 0, "conv_width": 4}
_PRE_NORMS = {"pre_mixer_norm": "input_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
_POST_NORMS = {"post_mixer_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


def _switches(config: GemmaConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": int(config.query_scalar),
        "sliding_window": config.window,
        "layer_types": list(config.layer_types),
        "attn_logit_softcapping": as_float(config.attention_cap),
        "final_logit_softcapping": as_float(config.final_cap),
    }


def _read_vaultgemma(content: Content, fields: Fields) -> Fields:
    return _NOT_RECURRENT | layer_types(content, None) | one_rope(content)


def _read_gemma(content: Content, fields: Fields) -> Fields:
    found: Fields = {**_NOT_RECURRENT, **layer_types(content, (FULL,)), **one_rope(content)}
    if "head_dim" in fields:
        found["query_scalar"] = fields["head_dim"]
    if "max_length" in fields:
        found |= {"window": fields["max_length"], "attention_cap": None, "final_cap": None}
    return found


def _write_gemma(config: GemmaConfig) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", **plain_rope(config)}


def _read_gemma2(content: Content, fields: Fields) -> Fields:
    return _NOT_RECURRENT | layer_types(content, (SLIDING, FULL)) | one_rope(content)


def _read_gemma3(content: Content, fields: Fields) -> Fields:
    every = content.get("sliding_window_pattern") or 6
    nested = content.get("rope_parameters") or {}
    full = dict(nested.get(FULL) or content.get("rope_scaling") or {})
    full.setdefault("rope_theta", content.get("rope_theta"))
    sliding = dict(nested.get(SLIDING) or {})
    sliding.setdefault("rope_theta", content.get("rope_local_base_freq"))
    ropes = {"rope_full": rope(full), "rope_sliding": rope(sliding)}
    return {
        **_NOT_RECURRENT,
        "attention_cap": fields.get("attention_cap"),
        "final_cap": fields.get("final_cap"),
        **layer_types(content, (SLIDING,) * (every - 1) + (FULL,)),
        **{name: found for name, found in ropes.items() if found is not None},
    }


def _write_gemma3(config: GemmaConfig) -> dict[str, Any]:
    factor = config.rope_full.linear_factor
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    return _switches(config) | {
        "rope_theta": config.rope_full.theta,
        "rope_local_base_freq": config.rope_sliding.theta,
        "rope_scaling": scaling if factor != 1 else None,
        "rope_parameters": {
            FULL: {"rope_theta": config.rope_full.theta, **scaling},
            SLIDING: {"rope_theta": config.rope_sliding.theta, "rope_type": "default"},
        },
    }


VAULTGEMMA = Family(
    model_type="vaultgemma",
    hf_class="VaultGemmaForCausalLM",
    fixed=_PLAIN,
    keys=_SWITCHES,
    read=_read_vaultgemma,
    write=lambda config: _switches(config) | plain_rope(config),
    norms=_PRE_NORMS,
)
GEMMA = Family(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    fixed=_PLAIN,
    keys=_SWITCHES,
    read=_read_gemma,
    write=_write_gemma,
    # Gemma 1 and its successors mean different norms by post_attention_layernorm.
    norms={"pre_mixer_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"},
    activations=("gelu_pytorch_tanh", "gelu"),  # "gelu" in Gemma 1's files is legacy and means the same
)
GEMMA2 = Family(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    fixed=_PLAIN | {"post_norms": True},
    keys=_SWITCHES,
    read=_read_gemma2,
    write=lambda config: _switches(config) | plain_rope(config),
    norms=_PRE_NORMS | _POST_NORMS,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    fixed=_PLAIN | {"post_norms": True, "qk_norm": True},
    keys=_SWITCHES,
    read=_read_gemma3,
    write=_write_gemma3,
    norms=_PRE_NORMS | _POST_NORMS,
    wrapped_as="gemma3",
)
