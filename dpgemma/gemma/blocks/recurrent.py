"""RecurrentGemma's second kind of mixing: a real-gated linear recurrent unit behind a short causal convolution.

De et al. 2024, "Griffin", arXiv 2402.19427, sections 2.3 and 2.4. W is the unit's width, C the taps of the convolution.
The recurrence runs in float32 in any compute type.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpgemma.gemma.blocks.layers import Linear, residual_gain
from dpgemma.gemma.config import GemmaConfig
from dpgemma.privacy import operations
from dpgemma.privacy.operations import PRECISION

_SHARPNESS = 8.0
_LARGEST_SQRT_DERIVATIVE = 1000.0


@jax.custom_jvp
def _bounded_sqrt(x: jax.Array) -> Any:
    """sqrt whose derivative is cut at 1000, as the published models define it: at x = 0 the true one is infinite."""
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx / jnp.sqrt(jnp.maximum(4.0 * x, _LARGEST_SQRT_DERIVATIVE**-2))


class CausalConvolution(nnx.Module):
    """y_t = bias + sum over k of w_k x_{t - C + 1 + k}, for every channel by itself."""

    def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (width, taps)) * (0.01 / taps) ** 0.5)
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array, before: jax.Array, positions: jax.Array | None = None) -> Any:
        """The convolution over inputs.

        Args:
          x: [..., T, W].
          before: [..., C - 1, W], the inputs before the first.
          positions: [..., T] within texts that follow each other in a row, where none may see another.
        """
        w, length = operations.vector(self.w[...]).astype(x.dtype), x.shape[-2]
        joined = jnp.concatenate([before.astype(x.dtype), x], axis=-2)
        taps = w.shape[1]

        def term(k: int) -> Any:
            product = joined[..., k : k + length, :] * w[:, k]
            return product if positions is None else jnp.where((positions >= taps - 1 - k)[..., None], product, 0)

        return sum(map(term, range(taps))) + operations.vector(self.bias[...]).astype(x.dtype)


class BlockDiagonal(nnx.Module):
    """A gate's linear layer: channels in blocks, each with a matrix of its own."""

    def __init__(self, width: int, blocks: int, *, rngs: nnx.Rngs) -> None:
        size = width // blocks
        self.w = nnx.Param(jax.random.normal(rngs.params(), (blocks, size, size)) * (0.01 / size) ** 0.5)
        self.bias = nnx.Param(jnp.zeros((blocks, size)))

    def __call__(self, x: jax.Array) -> Any:
        w, bias = operations.vector(self.w[...]).astype(x.dtype), operations.vector(self.bias[...]).astype(x.dtype)
        blocks = x.reshape(*x.shape[:-1], *bias.shape)
        y = jnp.einsum("...tbi,bij->...tbj", blocks, w, precision=PRECISION) + bias
        return y.reshape(x.shape)


class RgLru(nnx.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t with log a_t = -8 r_t softplus(Lambda); the first token of all starts
    afresh.
    """

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        width = config.lru_width
        self.input_gate = BlockDiagonal(width, config.num_heads, rngs=rngs)
        self.recurrent_gate = BlockDiagonal(width, config.num_heads, rngs=rngs)
        # Uniform a^2 in [0.81, 0.998] at r = 1: softplus(Lambda) = -log(a^2) / 2 up to the sharpness, which the
        # published start leaves out.
        square = jax.random.uniform(rngs.params(), (width,), minval=0.9**2, maxval=0.999**2)
        self.recurrent_param = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(square))))

    def __call__(self, x: jax.Array, state: Any, positions: jax.Array, valid: jax.Array) -> Any:
        """States [..., T, W] in float32.

        Args:
          x: [..., T, W].
          state: float32 [..., W], that of the token before.
          positions: [..., T]; at position 0 the state before is ignored.
          valid: bool [..., T]; a token that is not leaves the state as it is.
        """
        x_f32 = x.astype(jnp.float32)
        gate_i = jax.nn.sigmoid(self.input_gate(x).astype(jnp.float32))
        gate_r = jax.nn.sigmoid(self.recurrent_gate(x).astype(jnp.float32))
        log_a = -_SHARPNESS * gate_r * jax.nn.softplus(operations.vector(self.recurrent_param[...]).astype(jnp.float32))
        is_first, valid = (positions == 0)[..., None], valid[..., None]
        multiplier = jnp.where(is_first, 1.0, _bounded_sqrt(1 - jnp.exp(2 * log_a)))
        a = jnp.where(valid, jnp.where(is_first, 0.0, jnp.exp(log_a)), 1.0)
        b = jnp.where(valid, multiplier * gate_i * x_f32, 0.0)
        decay, states = jax.lax.associative_scan(
            lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (a, b), axis=-2
        )
        return states + decay * state[..., None, :]


class Recurrent(nnx.Module):
    """out(rg_lru(conv(linear_x(x))) * gelu_tanh(linear_y(x)))."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        self.taps, self.width = c.conv_width, c.lru_width

        def options(name: str) -> Any:
            return dict(bias=True, lora=c.adapter(name), rngs=rngs)

        self.linear_x = Linear((c.d_model, c.lru_width), **options("linear_x"))
        self.linear_y = Linear((c.d_model, c.lru_width), **options("linear_y"))
        self.linear_out = Linear((c.lru_width, c.d_model), gain=residual_gain(c), **options("linear_out"))
        self.conv = CausalConvolution(c.lru_width, c.conv_width, rngs=rngs)
        self.rg_lru = RgLru(c, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> Any:
        """Mixing within rows x [..., T, D].

        Args:
          positions: [..., T] within texts that follow each other in a row; None where a row is one text.
        """
        batch, length = x.shape[:-2], x.shape[-2]
        start = jnp.zeros((*batch, self.width)), jnp.zeros((*batch, self.taps - 1, self.width), x.dtype)
        own = jnp.arange(length) if positions is None else positions
        return self.cached(x, start, own, jnp.ones(length, bool), several_texts=positions is not None)[0]

    def cached(
        self, x: jax.Array, cache: Any, positions: jax.Array, valid: jax.Array, several_texts: bool = False
    ) -> tuple[Any, Any]:
        """Mixes tokens that follow others, from the state that those left.

        Args:
          x: [..., T, D].
          cache: state float32 [..., W], and the convolution's last inputs [..., C - 1, W].
          positions, valid: [..., T]; tokens that are not valid come last and change nothing.
          several_texts: whether a text may begin, at position 0, behind another one.

        Returns:
          Output [..., T, D] and the new cache.
        """
        state, before = cache
        inputs = self.linear_x(x)
        mixed = self.conv(inputs, before, positions if several_texts else None)
        states = self.rg_lru(mixed, state, positions, valid)
        out = self.linear_out(states.astype(x.dtype) * jax.nn.gelu(self.linear_y(x), approximate=True))
        joined = jnp.concatenate([before, inputs.astype(before.dtype)], axis=-2)
        last = jnp.sum(valid, axis=-1)[..., None] + jnp.arange(self.taps - 1)
        last = jnp.broadcast_to(last, (*joined.shape[:-2], self.taps - 1))
        return out, (states[..., -1, :], jnp.take_along_axis(joined, last[..., None], axis=-2))
