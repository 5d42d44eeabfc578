"""The operations where weights meet activations, and the ones without weights around them.

Shape letters: T tokens, D model width, N query heads, K key-value heads, H head width, F feed-forward width, V vocabulary.
A leading `...` stands for any batch axes. Weights are stored in float32 and cast to the activations' type where they are used.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.gemma.config import GemmaConfig, Rope

# Without this, accelerators compute float32 products in reduced precision; it changes nothing for bfloat16 operands.
PRECISION = jax.lax.Precision.HIGHEST
EMBEDDING_SCALE = 0.02


class Einsum(nnx.Module):
    """A weight contracted with its input by an einsum equation `x,w->y`."""

    def __init__(self, equation: str, shape: tuple[int, ...], fan_in: int, *, gain: float = 1.0, rngs: nnx.Rngs):
        self.equation = equation
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * (gain * fan_in**-0.5))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...].astype(x.dtype), precision=PRECISION)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), computed in float32 and cast back (Hugging Face's order)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        x_f32 = x.astype(jnp.float32)
        normed = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)
        return (normed * (1 + self.scale[...])).astype(x.dtype)


class Embedder(nnx.Module):
    """The tied embedding: unscaled rows [V, D], multiplied by sqrt(D) on the input side only."""

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs):
        # Small, so that a token's own row in the residual stream does not make the first predictions copy it.
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, d_model)) * EMBEDDING_SCALE)

    def encode(self, tokens, dtype):
        rows = self.embedding[...][tokens]
        # The published models round the scale to the parameters' type, which is float32 here.
        return (rows * jnp.sqrt(jnp.asarray(rows.shape[-1], rows.dtype))).astype(dtype)


def soft_cap(x, cap: float | None):
    """c * tanh(x / c), or x where cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotary_angles(length: int, head_dim: int, rope: Rope):
    """Angles [T, H/2] of the half-split rotary embedding."""
    inverse_frequency = rope.theta ** -(jnp.arange(head_dim // 2, dtype=jnp.float32) * 2 / head_dim)
    return jnp.arange(length, dtype=jnp.float32)[:, None] / rope.linear_factor * inverse_frequency


def rotate(x_TxNxH, angles):
    """Rotates the pairs (i, i + H/2) of every head by that position's angles [T, H/2]."""
    x_f32 = x_TxNxH.astype(jnp.float32)
    first, second = jnp.split(x_f32, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TxNxH.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with optional query/key norms and score soft-cap; scores and softmax in float32."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.q = Einsum("...td,ndh->...tnh", (c.num_heads, c.d_model, c.head_dim), c.d_model, rngs=rngs)
        self.k = Einsum("...td,kdh->...tkh", (c.num_kv_heads, c.d_model, c.head_dim), c.d_model, rngs=rngs)
        self.v = Einsum("...td,kdh->...tkh", (c.num_kv_heads, c.d_model, c.head_dim), c.d_model, rngs=rngs)
        # Residual branches start small, so that depth does not grow the stream's variance.
        gain = (2 * c.num_layers) ** -0.5
        fan_in = c.num_heads * c.head_dim
        self.out = Einsum("...tnh,nhd->...td", (c.num_heads, c.head_dim, c.d_model), fan_in, gain=gain, rngs=rngs)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def __call__(self, x, angles, mask_TxS):
        c = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        q = q * jnp.asarray(c.query_scalar**-0.5, q.dtype)
        # Query head n reads key-value head n // (N / K).
        q = q.reshape(*q.shape[:-2], c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        scores = jnp.einsum("...tkgh,...skh->...kgts", q, k, precision=PRECISION, preferred_element_type=jnp.float32)
        scores = jnp.where(mask_TxS, soft_cap(scores, c.attention_cap), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("...kgts,...skh->...tkgh", weights, v, precision=PRECISION)
        return self.out(mixed.reshape(*mixed.shape[:-3], c.num_heads, c.head_dim))


class FeedForward(nnx.Module):
    """GeGLU: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = Einsum("...td,df->...tf", (c.d_model, c.d_ff), c.d_model, rngs=rngs)
        self.up = Einsum("...td,df->...tf", (c.d_model, c.d_ff), c.d_model, rngs=rngs)
        gain = (2 * c.num_layers) ** -0.5
        self.down = Einsum("...tf,fd->...td", (c.d_ff, c.d_model), c.d_ff, gain=gain, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """One decoder layer: pre-norm residual attention, then pre-norm residual feed-forward."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(config.d_model, config.norm_eps)
        self.post_norms = config.post_norms
        self.pre_attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.pre_ffw_norm = norm()
        self.mlp = FeedForward(config, rngs=rngs)
        if config.post_norms:
            self.post_attention_norm = norm()
            self.post_ffw_norm = norm()

    def __call__(self, x, angles, mask_TxS):
        attended = self.attention(self.pre_attention_norm(x), angles, mask_TxS)
        x = x + (self.post_attention_norm(attended) if self.post_norms else attended)
        fed = self.mlp(self.pre_ffw_norm(x))
        return x + (self.post_ffw_norm(fed) if self.post_norms else fed)
