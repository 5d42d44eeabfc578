"""Grouped-query attention: its projections, and the ways of computing it.

Shape letters as in `layers`; S is the number of keys and G = N / K the number of query heads that share a key head.

The ways of computing causal attention agree to rounding: "dense" holds all scores of a row at once; "blockwise" holds
one tile of them, forward and backward (Dao et al. 2022, arXiv 2205.14135), and skips tiles that no query can see;
"fused" is jax.nn.dot_product_attention, which knows windows but no soft-caps.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.choices import AUTO, BLOCKWISE, DENSE, FUSED
from dpgemma.gemma.blocks.layers import Linear, RMSNorm, residual_gain, rotate, soft_cap
from dpgemma.gemma.blocks.masks import Window, causal
from dpgemma.gemma.config import FULL, SLIDING, GemmaConfig
from dpgemma.privacy.operations import PRECISION

BLOCK = 256
# Rows up to this length keep all their scores: tiles would save little memory and cost time.
LONGEST_DENSE = 1024
HIDDEN = jnp.finfo(jnp.float32).min

_dot = functools.partial(jnp.einsum, precision=PRECISION, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Projections, optional norms of queries and keys, rotary embedding; scores and softmax in float32."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        self.config = c

        def project(name: str, heads: Any) -> Any:
            return Linear((c.d_model, heads, c.head_dim), lora=c.adapter(name), rngs=rngs)

        self.q = project("q_proj", c.num_heads)
        self.k = project("k_proj", c.num_kv_heads)
        self.v = project("v_proj", c.num_kv_heads)
        shape = (c.num_heads, c.head_dim, c.d_model)
        self.out = Linear(shape, inputs=2, gain=residual_gain(c), bias=c.biases, lora=c.adapter("o_proj"), rngs=rngs)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def __call__(
        self, x: jax.Array, angles: jax.Array, mask: Window, is_sliding: jax.Array, implementation: str
    ) -> Any:
        """Self-attention within x [..., T, D].

        Args:
          angles: rotary angles [T, R/2].
          mask: which positions see which.
          is_sliding: whether this layer sees only its window, for JAX's own kernel; may be traced.
          implementation: one of dpgemma.choices.ATTENTION.
        """
        q, k, v = self._project(x, angles)
        return self._join(attend(q, k, v, mask, self.config, is_sliding, implementation))

    def cached(
        self, x: jax.Array, angles: jax.Array, is_sliding: jax.Array, cache: Any, positions: jax.Array
    ) -> tuple[Any, Any]:
        """Attends from tokens that follow others, and writes their keys and values into the cache.

        Args:
          x: [B, T, D].
          angles: [B, T, R/2].
          cache: keys and values, each [B, S, K, H].
          positions: int32 [B, T]; a position of S or more is not written.

        Returns:
          Output [B, T, D] and the new cache.
        """
        q, k, v = self._project(x, angles)
        rows = jnp.arange(x.shape[0])[:, None]
        keys, values = (
            old.at[rows, positions].set(new.astype(old.dtype), mode="drop")
            for old, new in zip(cache, (k, v), strict=True)
        )
        t, s = positions[:, :, None], jnp.arange(keys.shape[1])
        visible_BxTxS = causal(keys.shape[1], self.config.window, is_sliding).visible(t, s, keys.shape[1])
        mixed = _softmax_mix(
            q, keys.astype(q.dtype), values.astype(q.dtype), visible_BxTxS[:, None, None], self.config.attention_cap
        )
        return self._join(mixed), (keys, values)

    def _project(self, x: jax.Array, angles: jax.Array) -> tuple[Any, Any, Any]:
        c = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        q = q * jnp.asarray(c.query_scalar**-0.5, q.dtype)
        # Query head n reads key-value head n // G.
        return q.reshape(*q.shape[:-2], c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim), k, v

    def _join(self, mixed_TxKxGxH: jax.Array) -> Any:
        return self.out(mixed_TxKxGxH.reshape(*mixed_TxKxGxH.shape[:-3], self.config.num_heads, self.config.head_dim))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Window,
    config: GemmaConfig,
    is_sliding: jax.Array,
    implementation: str,
) -> Any:
    """Attention of scaled queries [..., T, K, G, H] over keys and values [..., T, K, H], shaped like the queries."""
    length = q.shape[-4]
    plain = not mask.after and mask.begins is None
    if implementation == AUTO and plain and config.attention_cap is None and _cudnn_takes(q, k, v, config):
        implementation = FUSED
    elif implementation == AUTO:
        implementation = DENSE if length <= LONGEST_DENSE else BLOCKWISE
    if implementation == FUSED:
        if not plain:
            raise ValueError("fused attention is causal, over whole rows: use blockwise or dense")
        return _fused(q, k, v, config, is_sliding)
    if implementation == BLOCKWISE:
        return _blockwise(config.attention_cap, q, k, v, mask)
    t, s = jnp.arange(length)[:, None], jnp.arange(length)
    return _softmax_mix(q, k, v, mask.visible(t, s, length), config.attention_cap)


def _softmax_mix(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, cap: float | None) -> Any:
    scores = soft_cap(_dot("...tkgh,...skh->...kgts", q, k), cap)
    weights = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1).astype(v.dtype)
    return jnp.einsum("...kgts,...skh->...tkgh", weights, v, precision=PRECISION)


def _cudnn_takes(q: jax.Array, k: jax.Array, v: jax.Array, config: GemmaConfig) -> bool:
    """Whether cuDNN has a kernel for these shapes and types on this GPU; False on other devices."""
    if jax.default_backend() != "gpu" or q.dtype != jnp.bfloat16:
        return False

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return _fused(q, k, v, config, jnp.bool_(True)).astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(mixed, (0, 1, 2)), q, k, v)
    except (NotImplementedError, RuntimeError, ValueError):  # as jax refuses what the kernel does not take
        return False
    return True


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, config: GemmaConfig, is_sliding: jax.Array) -> Any:
    """jax.nn.dot_product_attention, on a GPU in bfloat16 by cuDNN's flash attention.

    Raises:
      ValueError: the model caps its scores.
    """
    if config.attention_cap is not None:
        raise ValueError("fused attention knows no soft-caps: use blockwise or dense")
    batch, (length, kv_heads, groups, width) = q.shape[:-4], q.shape[-4:]

    def flat(x: jax.Array, heads: Any) -> Any:
        return x.reshape(-1, length, heads, width)

    on_gpu = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16

    def attend(window: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        kernel: Literal["cudnn", "xla"] = "cudnn" if on_gpu else "xla"
        return jax.nn.dot_product_attention(
            q, k, v, scale=1.0, is_causal=True, local_window_size=window, implementation=kernel
        )

    # The kernel wants its window as a constant; layers of one kind need no choice.
    branches = {FULL: functools.partial(attend, None), SLIDING: functools.partial(attend, (config.window - 1, 0))}
    kinds = sorted(set(config.layer_types) & set(branches))
    operands = flat(q, kv_heads * groups), flat(k, kv_heads), flat(v, kv_heads)
    mixed = (
        branches[kinds[0]](*operands)
        if len(kinds) == 1
        else jax.lax.cond(is_sliding, branches[SLIDING], branches[FULL], *operands)
    )
    return mixed.reshape(*batch, length, kv_heads, groups, width)


def _tiles(x: jax.Array, axis: int) -> Any:
    """Pads an axis with zeros to a multiple of BLOCK. The mask hides padded keys from every query."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, padding)


def _tile(x: jax.Array, i: Any, axis: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis)


def _add_to_tile(x: jax.Array, i: Any, axis: int, value: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(x, _tile(x, i, axis) + value, i * BLOCK, axis)


def _tile_scores(
    cap: float | None, q: jax.Array, k: jax.Array, i: Any, j: Any, mask: Window, length: int
) -> tuple[Any, Any]:
    """Capped scores [..., K, G, BLOCK, BLOCK] of query tile i and key tile j, and which of them are visible.

    Args:
      length: of a row, behind which tiles are padding.
    """
    t, s = i * BLOCK + jnp.arange(BLOCK)[:, None], j * BLOCK + jnp.arange(BLOCK)
    return soft_cap(_dot("...tkgh,...skh->...kgts", q, k), cap), mask.visible(t, s, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, mask: Window) -> Any:
    return _blockwise_forward(cap, q, k, v, mask)[0]


def _blockwise_forward(cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, mask: Window) -> tuple[Any, Any]:
    length = q.shape[-4]
    q_tiles, k_tiles, v_tiles = _tiles(q, -4 + q.ndim), _tiles(k, -3 + k.ndim), _tiles(v, -3 + v.ndim)
    count = q_tiles.shape[-4] // BLOCK

    def query_tile(_: Any, i: Any) -> tuple[Any, Any]:
        q_i = _tile(q_tiles, i, q.ndim - 4)

        def add_key_tile(j: Any, carry: Any) -> tuple[Any, Any, Any]:
            maximum, total, mixed = carry
            k_j, v_j = _tile(k_tiles, j, k.ndim - 3), _tile(v_tiles, j, v.ndim - 3)
            scores, visible = _tile_scores(cap, q_i, k_j, i, j, mask, length)
            scores = jnp.where(visible, scores, HIDDEN)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
            shrink = jnp.exp(maximum - new_maximum)
            mixed = mixed * shrink[..., None] + _dot("...kgts,...skh->...kgth", weights.astype(v.dtype), v_j)
            return new_maximum, total * shrink + weights.sum(axis=-1), mixed

        rows = (*q_i.shape[:-4], *q_i.shape[-3:-1], BLOCK)
        start = jnp.full(rows, HIDDEN), jnp.zeros(rows), jnp.zeros((*rows, q.shape[-1]))
        first, end = mask.key_tiles(i, BLOCK, count)
        maximum, total, mixed = jax.lax.fori_loop(first, end, add_key_tile, start)
        return None, (mixed / total[..., None], maximum + jnp.log(total))

    _, (mixed, log_total) = jax.lax.scan(query_tile, None, jnp.arange(count))
    # [tiles, ..., K, G, BLOCK, H] to [..., T, K, G, H], and the same for the normalisers [..., K, G, T].
    mixed = jnp.moveaxis(jnp.moveaxis(mixed, 0, -3).reshape(*mixed.shape[1:-2], count * BLOCK, -1), -2, -4)
    log_total = jnp.moveaxis(log_total, 0, -2).reshape(*log_total.shape[1:-1], count * BLOCK)
    out = mixed[..., :length, :, :, :].astype(q.dtype)
    return out, (q, k, v, mask, out, log_total)


def _blockwise_backward(cap: float | None, residuals: Any, d_out: Any) -> tuple[Any, Any, Any, Any]:
    q, k, v, mask, out, log_total = residuals
    length, axis_q, axis_k = q.shape[-4], q.ndim - 4, k.ndim - 3
    # What the softmax's normaliser takes back: the row sums of the output times its cotangent.
    taken = jnp.moveaxis((out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1), -3, -1)
    taken = _tiles(taken, taken.ndim - 1)
    q_tiles, k_tiles, v_tiles, d_tiles = (
        _tiles(q, axis_q),
        _tiles(k, axis_k),
        _tiles(v, axis_k),
        _tiles(d_out.astype(q.dtype), axis_q),
    )
    count = q_tiles.shape[-4] // BLOCK

    def key_tile(dq: Any, j: Any) -> tuple[Any, Any]:
        k_j, v_j = _tile(k_tiles, j, axis_k), _tile(v_tiles, j, axis_k)

        def add_query_tile(i: Any, carry: Any) -> tuple[Any, Any, Any]:
            dq, dk, dv = carry
            q_i, d_i = _tile(q_tiles, i, axis_q), _tile(d_tiles, i, axis_q)
            scores, visible = _tile_scores(cap, q_i, k_j, i, j, mask, length)
            normaliser, taken_i = _tile(log_total, i, log_total.ndim - 1), _tile(taken, i, taken.ndim - 1)
            weights = jnp.where(visible, jnp.exp(scores - normaliser[..., None]), 0.0)
            dv = dv + _dot("...kgts,...tkgh->...skh", weights.astype(v.dtype), d_i)
            d_scores = weights * (_dot("...tkgh,...skh->...kgts", d_i, v_j) - taken_i[..., None])
            if cap is not None:
                d_scores = d_scores * (1 - (scores / cap) ** 2)
            d_scores = d_scores.astype(q.dtype)
            dk = dk + _dot("...kgts,...tkgh->...skh", d_scores, q_i)
            return _add_to_tile(dq, i, axis_q, _dot("...kgts,...skh->...tkgh", d_scores, k_j)), dk, dv

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        first, end = mask.query_tiles(j, BLOCK, count)
        dq, dk, dv = jax.lax.fori_loop(first, end, add_query_tile, (dq, zeros, zeros))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(key_tile, jnp.zeros(q_tiles.shape, jnp.float32), jnp.arange(count))

    def join(x: jax.Array) -> Any:
        return jnp.moveaxis(x, 0, -4).reshape(*x.shape[1:-3], count * BLOCK, *x.shape[-2:])[..., :length, :, :]

    return dq[..., :length, :, :, :].astype(q.dtype), join(dk).astype(k.dtype), join(dv).astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
