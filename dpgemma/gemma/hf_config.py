"""config.json of a Hugging Face directory, with every value explicit: the class defaults of transformers are another model's."""

from accounting.errors import InputError
from dpgemma.gemma.config import GemmaConfig

SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def to_hf_config(config: GemmaConfig) -> dict:
    """The file's content for float32 weights.

    Raises:
      InputError: a decoder that the file format of VaultGemma cannot express.
    """
    c = config
    inexpressible = c.qk_norm or c.post_norms or not c.causal or c.rope_full != c.rope_sliding or c.rope_full.linear_factor != 1
    if c.model_type != "vaultgemma" or inexpressible:
        raise InputError(f"only VaultGemma decoders can be exported, not {c.model_type}")
    return {
        "architectures": ["VaultGemmaForCausalLM"],
        "model_type": "vaultgemma",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "query_pre_attn_scalar": int(c.query_scalar),
        "max_position_embeddings": c.max_length,
        "sliding_window": c.window,
        "layer_types": list(c.layer_types),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.final_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_full.theta,
        "rope_parameters": {"rope_theta": c.rope_full.theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **SPECIAL_IDS,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
        "dtype": "float32",
    }
