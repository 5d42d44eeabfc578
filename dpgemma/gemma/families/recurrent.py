"""RecurrentGemma: recurrent units between layers of sliding attention."""

from typing import Any

from dpgemma.gemma.config import RECURRENT, SLIDING, GemmaConfig
from dpgemma.gemma.family import ATTENTION_TARGETS, Content, Family, Fields, as_float, one_rope, plain_rope

# Its files name no context; the published models were trained on this one.
_CONTEXT = 8192
_KINDS = {"recurrent": RECURRENT, "attention": SLIDING}


def _read(content: Content, fields: Fields) -> Fields:
    period = tuple(
        _KINDS[name] for name in content.get("block_types") or content.get("_block_types") or content["block_types"]
    )
    layers = content["num_hidden_layers"]
    nested = content.get("rope_parameters") or {}
    share = content.get("partial_rotary_factor", nested.get("partial_rotary_factor", 0.5))
    head_dim = fields["d_model"] // fields["num_heads"]
    return {
        # transformers stores twice the width of a feed-forward layer, and no head width.
        "d_ff": content["intermediate_size"] // 2,
        "head_dim": head_dim,
        "query_scalar": head_dim,
        "lru_width": content.get("lru_width") or fields["d_model"],
        "max_length": fields.get("max_length", _CONTEXT),
        "attention_cap": None,
        "layer_types": (period * layers)[:layers],
        **one_rope(content, share),
    }


def _write(config: GemmaConfig) -> dict[str, Any]:
    share = {"partial_rotary_factor": config.rope_full.share}
    plain = plain_rope(config)
    return {
        "intermediate_size": 2 * config.d_ff,
        "attention_window_size": config.window,
        "logits_soft_cap": as_float(config.final_cap),
        "lru_width": config.lru_width,
        "conv1d_width": config.conv_width,
        "block_types": ["recurrent" if kind == RECURRENT else "attention" for kind in config.layer_types],
        **share,
        **plain,
        "rope_parameters": plain["rope_parameters"] | share,
    }


RECURRENT_GEMMA = Family(
    model_type="recurrent_gemma",
    hf_class="RecurrentGemmaForCausalLM",
    fixed={"qk_norm": False, "post_norms": False, "biases": True, "bfloat16_scale": True},
    keys={
        "attention_window_size": "window",
        "logits_soft_cap": "final_cap",
        "lru_width": "lru_width",
        "conv1d_width": "conv_width",
    },
    read=_read,
    write=_write,
    norms={"pre_mixer_norm": "temporal_pre_norm", "pre_ffw_norm": "channel_pre_norm"},
    final_norm="model.final_norm.weight",
    mixer="temporal_block",
    mlp="mlp_block",
    lora_targets=(*ATTENTION_TARGETS, "linear_x", "linear_y", "linear_out"),
)
