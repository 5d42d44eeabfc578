"""The Gemma decoder as a pure function of its parameters.

`init_parameters` returns a plain nested dict of float32 arrays; every block's parameters are stacked along a leading layer axis.
`hidden_states` and `logits` take that dict, so that a trainer needs to know nothing about modules.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.gemma.config import SLIDING, GemmaConfig
from dpgemma.gemma.layers import PRECISION, Block, Embedder, RMSNorm, rotary_angles, soft_cap

REMAT_POLICIES = ("none", "block")


class Decoder(nnx.Module):
    """Embedding, one block per layer (stacked), final norm."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.embedder = Embedder(config.vocab_size, config.d_model, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_blocks(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)


def init_parameters(config: GemmaConfig, key: jax.Array) -> dict:
    """Random float32 parameters: normal with variance 1 / fan-in, norm scales zero (the identity)."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def parameter_shapes(config: GemmaConfig) -> dict:
    """The parameter tree as shapes and types, without allocating anything."""
    return jax.eval_shape(functools.partial(init_parameters, config), jax.eval_shape(lambda: jax.random.key(0)))


def num_parameters(config: GemmaConfig) -> int:
    """How many numbers the model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))


def count_parameters(config: GemmaConfig) -> int:
    """Number of parameters, the tied embedding counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))


@functools.lru_cache
def _graphs(config: GemmaConfig):
    """Module structure of the whole decoder and of a single block, without their parameters."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(params=0)))
    return nnx.split(decoder, nnx.Param), nnx.split(block, nnx.Param)


def _bind(graph_and_state, parameters):
    graph, state, *rest = graph_and_state
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state, *rest)


def _masks(config: GemmaConfig, length: int):
    """Visibility [2, T, T] of (full, sliding) layers; True where query t may see key s."""
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    if config.causal:
        full = s <= t
        return jnp.stack([full, full & (s > t - config.window)])
    return jnp.stack([jnp.ones((length, length), bool), jnp.abs(t - s) < config.window // 2 + 1])


def hidden_states(config: GemmaConfig, parameters: dict, tokens, *, dtype=jnp.float32, remat: str = "none"):
    """Final-norm outputs [..., T, D] of tokens [..., T].

    Args:
      dtype: type of the activations and matrix products (float32 or bfloat16); norms, scores and softmax stay float32.
      remat: "none" keeps activations for the backward pass, "block" recomputes each block from its input.

    Raises:
      ValueError: more tokens than the model's context, or an unknown remat policy.
    """
    length = tokens.shape[-1]
    if length > config.max_length:
        raise ValueError(f"{length} tokens exceed the model's context of {config.max_length}")
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {remat!r}")
    decoder_graph, block_graph = _graphs(config)
    angles = jnp.stack([rotary_angles(length, config.head_dim, rope) for rope in (config.rope_full, config.rope_sliding)])
    masks = _masks(config, length)

    def apply_block(x, layer):
        block_parameters, is_sliding = layer
        return _bind(block_graph, block_parameters)(x, angles[is_sliding], masks[is_sliding]), None

    if remat == "block":
        apply_block = jax.checkpoint(apply_block, prevent_cse=False)
    decoder = _bind(decoder_graph, parameters)
    is_sliding = jnp.array([kind == SLIDING for kind in config.layer_types], jnp.int32)
    x = decoder.embedder.encode(tokens, dtype)
    x, _ = jax.lax.scan(apply_block, x, (parameters["blocks"], is_sliding))
    return decoder.final_norm(x)


def logits(config: GemmaConfig, parameters: dict, hidden):
    """Next-token logits [..., V] in float32 of hidden states [..., D]; for inference (training uses gemma.loss)."""
    embedding = parameters["embedder"]["embedding"].astype(hidden.dtype)
    scores = jnp.einsum("...d,vd->...v", hidden, embedding, precision=PRECISION, preferred_element_type=jnp.float32)
    return soft_cap(scores, config.final_cap)
