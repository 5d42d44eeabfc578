"""The layers where weights meet activations, and the operations without weights around them.

Weights are touched by `privacy.operations` only, which knows how each enters the norm of a gradient.

Shape letters: T tokens, D model width, N query heads, K key-value heads, H head width, F feed-forward width, V
vocabulary. A leading `...` stands for any batch axes. Weights are cast to the activations' type where they are used.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.gemma.config import GemmaConfig, Lora, Rope
from dpgemma.privacy import operations

EMBEDDING_SCALE = 0.02


class Linear(nnx.Module):
    """A linear layer, with an optional bias and an optional adapter.

    Args:
      shape: of the weight: the axes that it contracts, then those that it gives; a matrix [fan-in, fan-out] with its
        axes split.
      inputs: how many axes it contracts.
      gain: of the random weights, relative to a standard deviation of fan-in ** -0.5.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        inputs: int = 1,
        gain: float = 1.0,
        bias: bool = False,
        lora: Lora | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.inputs, self.lora = inputs, lora
        bound = math.prod(shape[:inputs]) ** -0.5
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * (gain * bound))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[inputs:]))
        if lora is not None:
            self.lora_a = nnx.Param(
                jax.random.uniform(rngs.params(), (*shape[:inputs], lora.rank), minval=-bound, maxval=bound)
            )
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, *shape[inputs:])))

    def __call__(self, x: jax.Array) -> Any:
        y = operations.linear(x, self.w[...], self.inputs)
        if self.lora is not None:
            low = operations.linear(x, self.lora_a[...], self.inputs)
            y = y + operations.linear(low, self.lora_b[...]) * jnp.asarray(self.lora.alpha / self.lora.rank, x.dtype)
        return y + operations.vector(self.bias[...]).astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), computed in float32 and cast back (Hugging Face's order)."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> Any:
        x_f32 = x.astype(jnp.float32)
        normed = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)
        return (normed * (1 + operations.vector(self.scale[...]).astype(jnp.float32))).astype(x.dtype)


class Embedder(nnx.Module):
    """The tied embedding: unscaled rows [V, D], multiplied by sqrt(D) on the input side only."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        self.bfloat16_scale = config.bfloat16_scale
        # Small, so that a token's own row in the residual stream does not make the first predictions copy it.
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)) * EMBEDDING_SCALE
        )

    def encode(self, tokens: Any, dtype: Any) -> Any:
        rows = operations.embedding(tokens, self.embedding[...], dtype)
        # The published models round the scale to the type that they compute in.
        scale = jnp.asarray(rows.shape[-1] ** 0.5, jnp.bfloat16 if self.bfloat16_scale else dtype)
        return rows * scale.astype(dtype)


def soft_cap(x: jax.Array, cap: float | None) -> Any:
    """c * tanh(x / c), or x where cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotary_angles(positions: jax.Array, head_dim: int, rope: Rope) -> Any:
    """Angles [..., R/2] at positions [...] of the half-split rotary embedding of the first R = share * H entries of
    each head.
    """
    rotated = int(head_dim * rope.share)
    inverse_frequency = rope.theta ** -(jnp.arange(rotated // 2, dtype=jnp.float32) * 2 / rotated)
    return positions.astype(jnp.float32)[..., None] / rope.linear_factor * inverse_frequency


def rotate(x_TxNxH: jax.Array, angles: jax.Array) -> Any:
    """Rotates the pairs (i, i + R/2) of every head by that position's angles [..., T, R/2]; entries from R on stay as
    they are.
    """
    half = angles.shape[-1]
    x_f32 = x_TxNxH.astype(jnp.float32)
    first, second, rest = x_f32[..., :half], x_f32[..., half : 2 * half], x_f32[..., 2 * half :]
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(
        x_TxNxH.dtype
    )


def residual_gain(config: GemmaConfig) -> float:
    """Residual branches start small, so that depth does not grow the stream's variance."""
    return (2 * config.num_layers) ** -0.5


class FeedForward(nnx.Module):
    """GeGLU: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        c = config

        def options(name: str) -> Any:
            return dict(bias=c.biases, lora=c.adapter(name), rngs=rngs)

        self.gate = Linear((c.d_model, c.d_ff), **options("gate_proj"))
        self.up = Linear((c.d_model, c.d_ff), **options("up_proj"))
        self.down = Linear((c.d_ff, c.d_model), gain=residual_gain(c), **options("down_proj"))

    def __call__(self, x: jax.Array) -> Any:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))
