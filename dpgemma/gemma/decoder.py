"""The Gemma decoder as a pure function of its parameters.

`init_parameters` returns a plain nested dict of float32 arrays; the parameters of all blocks of a kind are stacked
along a leading layer axis. `hidden_states` and `logits` take that dict, so that a trainer needs to know nothing about
modules.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.choices import ATTENTION, REMAT_POLICIES
from dpgemma.gemma.blocks.attention import Attention
from dpgemma.gemma.blocks.layers import Embedder, FeedForward, RMSNorm, rotary_angles, soft_cap
from dpgemma.gemma.blocks.masks import causal
from dpgemma.gemma.blocks.recurrent import Recurrent
from dpgemma.gemma.config import RECURRENT, SLIDING, GemmaConfig
from dpgemma.privacy.operations import PRECISION

ATTENTION_BLOCKS, RECURRENT_BLOCKS = "blocks", "recurrent_blocks"
_MIXERS = {ATTENTION_BLOCKS: Attention, RECURRENT_BLOCKS: Recurrent}


class Block(nnx.Module):
    """One decoder layer: pre-norm residual mixing of tokens, then pre-norm residual feed-forward."""

    def __init__(self, config: GemmaConfig, stack: str, *, rngs: nnx.Rngs) -> None:
        def norm() -> Any:
            return RMSNorm(config.d_model, config.norm_eps)

        self.post_norms = config.post_norms
        self.pre_mixer_norm = norm()
        self.mixer = _MIXERS[stack](config, rngs=rngs)
        self.pre_ffw_norm = norm()
        self.mlp = FeedForward(config, rngs=rngs)
        if config.post_norms:
            self.post_mixer_norm = norm()
            self.post_ffw_norm = norm()

    def __call__(self, x: jax.Array, mix: Any) -> tuple[Any, Any]:
        """Returns the block's output and whatever `mix(mixer, normed x)` returns beside the mixed tokens."""
        mixed, extra = mix(self.mixer, self.pre_mixer_norm(x))
        x = x + (self.post_mixer_norm(mixed) if self.post_norms else mixed)
        fed = self.mlp(self.pre_ffw_norm(x))
        return x + (self.post_ffw_norm(fed) if self.post_norms else fed), extra


def _stacked_blocks(config: GemmaConfig, stack: str, count: int, rngs: nnx.Rngs) -> Block:
    make = nnx.vmap(lambda rngs: Block(config, stack, rngs=rngs))
    return nnx.split_rngs(splits=count)(make)(rngs)


class Decoder(nnx.Module):
    """Embedding, one block per layer (stacked by kind), final norm."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        self.embedder = Embedder(config, rngs=rngs)
        for stack, count in _counts(config).items():
            if count:
                setattr(self, stack, _stacked_blocks(config, stack, count, rngs))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)


def _stacks(config: GemmaConfig) -> list[str]:
    """The stack that each layer's parameters lie in."""
    return [RECURRENT_BLOCKS if kind == RECURRENT else ATTENTION_BLOCKS for kind in config.layer_types]


def _counts(config: GemmaConfig) -> dict[str, int]:
    return {stack: _stacks(config).count(stack) for stack in _MIXERS}


def init_parameters(config: GemmaConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: normal with variance 1 / fan-in, norm scales zero (the identity)."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def parameter_shapes(config: GemmaConfig) -> dict[str, Any]:
    """The parameter tree as shapes and types, without allocating anything."""
    return jax.eval_shape(functools.partial(init_parameters, config), jax.eval_shape(lambda: jax.random.key(0)))


def count(tree: dict[str, Any]) -> int:
    """How many numbers a parameter tree holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_parameters(config: GemmaConfig) -> int:
    """How many numbers the model has, the tied embedding counted once."""
    return count(parameter_shapes(config))


@functools.lru_cache
def _graph(config: GemmaConfig, part: str) -> Any:
    """Structure of one part of the decoder, a single block in place of a stack, without its parameters."""
    parts = {
        "embedder": lambda rngs: Embedder(config, rngs=rngs),
        "final_norm": lambda rngs: RMSNorm(config.d_model, config.norm_eps),
    }
    make = parts.get(part, lambda rngs: Block(config, part, rngs=rngs))
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))), nnx.Param)


def _bind(config: GemmaConfig, part: str, parameters: dict[str, Any]) -> Any:
    graph, state, *rest = _graph(config, part)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state, *rest)


def _layer(stack: dict[str, Any], number: int | None) -> dict[str, Any]:
    """Returns layer `number` of a stack, or `stack` itself if `number` is None because it is a single layer.

    Call it inside the checkpointed function: slices made outside of it would be kept for the backward pass.
    """
    return stack if number is None else jax.tree.map(lambda leaf: leaf[number], stack)


def _scan_layers(config: GemmaConfig, layers: dict[str, Any], x: jax.Array, apply_layer: Any) -> tuple[Any, Any]:
    """Applies every layer in order; one scan over the repetitions of the shortest period of layer kinds.

    Args:
      layers: for each stack, a tree of arrays with a leading axis of its layers.
      apply_layer: (stack, number, x, layers) -> (x, extra), which takes that number of the layers by `_layer`.

    Returns:
      The last x and, for each stack, the extras stacked along a leading axis.
    """
    stacks = _stacks(config)
    period = next(p for p in range(1, len(stacks) + 1) if all(stacks[i] == stacks[i % p] for i in range(len(stacks))))
    repetitions = len(stacks) // period
    inside = {stack: stacks[:period].count(stack) for stack in layers}

    def apply_period(x: jax.Array, group: Any, kinds: Any, alone: Any = ()) -> tuple[Any, Any]:
        extras: dict[str, list[Any]] = {stack: [] for stack in kinds}
        for stack in kinds:
            number = None if stack in alone else len(extras[stack])
            x, extra = apply_layer(stack, number, x, group[stack])
            extras[stack].append(extra)
        return x, {stack: jax.tree.map(lambda *leaves: jnp.stack(leaves), *items) for stack, items in extras.items()}

    def regular(leaf: Any, count: int) -> Any:
        used = leaf if leaf.shape[0] == repetitions * count else leaf[: repetitions * count]
        # Without need of another axis, none: XLA copies what is reshaped before it goes into a loop.
        return used if count == 1 else used.reshape(repetitions, count, *leaf.shape[1:])

    alone = [stack for stack in layers if inside[stack] == 1]
    groups = {stack: jax.tree.map(lambda leaf, n=inside[stack]: regular(leaf, n), layers[stack]) for stack in layers}
    x, extras = jax.lax.scan(lambda x, group: apply_period(x, group, stacks[:period], alone), x, groups)
    extras = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), extras)
    rest = stacks[repetitions * period :]
    if rest:
        tail = {
            stack: jax.tree.map(lambda leaf, n=inside[stack]: leaf[repetitions * n :], layers[stack])
            for stack in set(rest)
        }
        x, last = apply_period(x, tail, rest)
        extras |= {
            stack: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), extras[stack], last[stack]) for stack in last
        }
    return x, extras


def _layers(config: GemmaConfig, parameters: dict[str, Any], **beside: Any) -> dict[str, Any]:
    """For each stack: parameters, whether the layer is sliding, and what else belongs to the layer."""
    is_sliding = jnp.array([kind == SLIDING for kind in config.layer_types])
    numbers = {ATTENTION_BLOCKS: config.attention_layers, RECURRENT_BLOCKS: config.recurrent_layers}
    return {
        stack: {"parameters": parameters[stack], "is_sliding": is_sliding[jnp.array(numbers[stack])]}
        | {name: values[stack] for name, values in beside.items()}
        for stack, count in _counts(config).items()
        if count
    }


def _angles(config: GemmaConfig, positions: jax.Array) -> Any:
    """Rotary angles [2, ..., R/2] of full and of sliding layers."""
    return jnp.stack(
        [rotary_angles(positions, config.head_dim, rope) for rope in (config.rope_full, config.rope_sliding)]
    )


def hidden_states(
    config: GemmaConfig,
    parameters: dict[str, Any],
    tokens: Any,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    begins: jax.Array | None = None,
) -> Any:
    """Final-norm outputs [..., T, D] of tokens [..., T].

    Args:
      begins: int32 [..., T]; where rows hold several texts that must not see each other, the position at which each
        token's text begins, from which its own position is counted. None where a row is one text.
      dtype: type of the activations and matrix products (float32 or bfloat16); norms, scores and softmax stay float32.
      remat: "none" keeps activations for the backward pass, "block" recomputes each block from its input, "dots" keeps
        the results of matrix products with weights only.
      attention: how attention is computed; "auto" takes dense scores for short rows and tiles of them for long ones.

    Raises:
      ValueError: more tokens than the model's context, an unknown remat policy or way of attention.
    """
    length = tokens.shape[-1]
    if length > config.max_length:
        raise ValueError(f"{length} tokens exceed the model's context of {config.max_length}")
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {remat!r}")
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    positions = None if begins is None else jnp.arange(length) - begins
    angles = _angles(config, jnp.arange(length) if positions is None else positions)

    def apply_layer(stack: Any, number: int, x: jax.Array, layers: Any) -> Any:
        layer = _layer(layers, number)
        is_sliding = layer["is_sliding"]

        def mix(mixer: Any, y: jax.Array) -> tuple[Any, Any]:
            if stack == RECURRENT_BLOCKS:
                return mixer(y, positions), None
            mask = causal(length, config.window, is_sliding, begins)
            return mixer(y, angles[is_sliding.astype(jnp.int32)], mask, is_sliding, attention), None

        return _bind(config, stack, layer["parameters"])(x, mix)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        apply_layer = jax.checkpoint(apply_layer, prevent_cse=False, policy=policy, static_argnums=(0, 1))
    x = _bind(config, "embedder", parameters["embedder"]).encode(tokens, dtype)
    x, _ = _scan_layers(config, _layers(config, parameters), x, apply_layer)
    return _bind(config, "final_norm", parameters["final_norm"])(x)


def init_cache(config: GemmaConfig, batch: int, size: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """What `extend` knows of no tokens yet: keys and values [L, B, S, K, H] of attention layers; states [L, B, W] in
    float32 and the convolution's inputs [L, B, C - 1, W] of recurrent ones."""
    attention, recurrent = _counts(config)[ATTENTION_BLOCKS], _counts(config)[RECURRENT_BLOCKS]
    keys = (attention, batch, size, config.num_kv_heads, config.head_dim)
    state, inputs = (recurrent, batch, config.lru_width), (recurrent, batch, config.conv_width - 1, config.lru_width)
    return {
        ATTENTION_BLOCKS: (jnp.zeros(keys, dtype), jnp.zeros(keys, dtype)),
        RECURRENT_BLOCKS: (jnp.zeros(state), jnp.zeros(inputs, dtype)),
    }


def extend(
    config: GemmaConfig,
    parameters: dict[str, Any],
    cache: dict[str, Any],
    tokens: Any,
    positions: jax.Array,
    valid: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> tuple[Any, Any]:
    """Final-norm outputs [B, T, D] of tokens that follow those in the cache.

    Args:
      tokens: [B, T].
      positions: int32 [B, T], counted from 0 in every row.
      valid: bool [B, T]; tokens that are not valid come last in a row, change nothing, and have outputs without
        meaning.

    Returns:
      The outputs and the new cache.
    """
    angles = _angles(config, positions)
    size = cache[ATTENTION_BLOCKS][0].shape[2]
    slots = jnp.where(valid, positions, size)  # beyond the cache: not written

    def apply_layer(stack: Any, number: int, x: jax.Array, layers: Any) -> Any:
        layer = _layer(layers, number)
        is_sliding = layer["is_sliding"]

        def mix(mixer: Any, y: jax.Array) -> Any:
            if stack == RECURRENT_BLOCKS:
                return mixer.cached(y, layer["cache"], positions, valid)
            return mixer.cached(y, angles[is_sliding.astype(jnp.int32)], is_sliding, layer["cache"], slots)

        return _bind(config, stack, layer["parameters"])(x, mix)

    x = _bind(config, "embedder", parameters["embedder"]).encode(tokens, dtype)
    x, new = _scan_layers(config, _layers(config, parameters, cache=cache), x, apply_layer)
    return _bind(config, "final_norm", parameters["final_norm"])(x), {**cache, **new}


def logits(config: GemmaConfig, parameters: dict[str, Any], hidden: jax.Array) -> Any:
    """Next-token logits [..., V] in float32 of hidden states [..., D]; for inference (not used in training)."""
    embedding = parameters["embedder"]["embedding"].astype(hidden.dtype)
    scores = jnp.einsum("...d,vd->...v", hidden, embedding, precision=PRECISION, preferred_element_type=jnp.float32)
    return soft_cap(scores, config.final_cap)
