"""Tiny models of every family: their settings as transformers spells them, and weights that are a function of their
names.
"""

import functools
import zlib

import jax
import numpy as np

from dpgemma.gemma import decoder

COMMON = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
RECURRENT = {k: v for k, v in COMMON.items() if k not in ("head_dim", "max_position_embeddings")}
# Name: transformers' model type, its settings. Where query_pre_attn_scalar is not head_dim, mistaking the two shows.
FAMILIES = {
    "vaultgemma": (
        "vaultgemma",
        COMMON
        | dict(query_pre_attn_scalar=16, sliding_window=8, layer_types=["full_attention"] * 4)
        | dict.fromkeys(CAPS),
    ),
    "vaultgemma_capped": ("vaultgemma", COMMON | dict(query_pre_attn_scalar=16, sliding_window=5) | CAPS),
    "gemma": ("gemma", COMMON | dict(num_key_value_heads=1)),
    "gemma_mha": ("gemma", COMMON | dict(num_key_value_heads=4)),
    "gemma2": ("gemma2", COMMON | dict(query_pre_attn_scalar=8, sliding_window=5) | CAPS),
    "gemma3": (
        "gemma3_text",
        COMMON | dict(num_hidden_layers=7, query_pre_attn_scalar=8, sliding_window=5, rope_parameters=GEMMA3_ROPE),
    ),
    # Two repetitions of (recurrent, recurrent, attention) and one layer more.
    "recurrent_gemma": (
        "recurrent_gemma",
        RECURRENT
        | dict(
            num_hidden_layers=7,
            num_key_value_heads=1,
            attention_window_size=5,
            intermediate_size=96,
            logits_soft_cap=3.0,
        ),
    ),
}
IDS = np.random.default_rng(0).integers(3, 90, (2, 19)).astype(np.int32)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of this name: of order one where it multiplies, small beside the 1 of a norm."""
    scale = 0.3 if len(shape) == 1 else 0.5 * shape[-1] ** -0.5
    return (scale * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="attention")
def our_logits(config, params, ids=IDS, attention="auto"):
    """dpgemma's logits, compiled once per configuration. Not for tests that change the code under way."""
    return decoder.logits(config, params, decoder.hidden_states(config, params, ids, attention=attention))
