"""Sampling text from a decoder, with the keys, values and states of earlier tokens kept."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.next_token import Sampling

# Tokens of the prompt that are read at a time: scores exist for these only, and every prompt runs the same program.
PREFILL = 128


def filtered(logits: jax.Array, sampling: Sampling) -> Any:
    """Logits [..., V] after temperature, with those of tokens that may not be drawn at minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it have not reached p: the first always does.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def _choose(logits: jax.Array, sampling: Sampling, keys: Any, position: Any) -> Any:
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def _read(
    config: GemmaConfig, parameters: Any, cache: Any, tokens: Any, positions: jax.Array, lengths: jax.Array, dtype: Any
) -> tuple[Any, Any]:
    """Reads PREFILL tokens; returns the hidden state of each row's last prompt token (if it is among them) and the
    cache.
    """
    hidden, cache = decoder.extend(
        config, parameters, cache, tokens, positions, positions < lengths[:, None], dtype=dtype
    )
    last = jnp.clip(lengths - 1 - positions[:, 0], 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


@functools.partial(jax.jit, static_argnums=(0, 1, 8))
def _continue(
    config: GemmaConfig,
    sampling: Sampling,
    parameters: Any,
    cache: Any,
    hidden: jax.Array,
    lengths: jax.Array,
    limits: Any,
    stop: Any,
    new_tokens: int,
    keys: Any,
) -> Any:
    """Up to `new_tokens` tokens for every row, until all have stopped: ids [B, new_tokens], -1 where there is none."""
    rows = lengths.shape[0]

    def goes_on(carry: Any) -> Any:
        step, *_, done = carry
        return (step < new_tokens) & ~done.all()

    def add_token(carry: Any) -> tuple[Any, Any, Any, Any, Any]:
        step, cache, hidden, ids, done = carry
        token = _choose(decoder.logits(config, parameters, hidden), sampling, keys, lengths + step)
        done = done | (token[:, None] == stop).any(axis=1) | (step >= limits)
        ids = ids.at[:, step].set(jnp.where(done, -1, token))
        positions = (lengths + step)[:, None]
        hidden, cache = decoder.extend(
            config, parameters, cache, token[:, None], positions, ~done[:, None], dtype=hidden.dtype
        )
        return step + 1, cache, hidden[:, 0], ids, done

    ids = jnp.full((rows, new_tokens), -1, jnp.int32)
    return jax.lax.while_loop(goes_on, add_token, (0, cache, hidden, ids, jnp.zeros(rows, bool)))[3]


def generate(
    config: GemmaConfig,
    parameters: dict[str, Any],
    prompts: list[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: tuple[int, ...],
    dtype: Any = jnp.float32,
    prefill: int = PREFILL,
    keys: Any = None,
    size: int | None = None,
) -> list[np.ndarray]:
    """Ids that continue each prompt, ended by one of `stop`, which is left out, or by the model's context.

    Args:
      prompts: ids, each beginning with bos; they may differ in length.
      prefill: tokens of the prompts that are read at a time.
      keys: a key of JAX for every prompt; by default made from the seed.
      size: tokens for which there is room, prompts included, so that several calls share a program; by default as many
        as are needed.

    Raises:
      ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or lengths.min() < 1 or lengths.max() >= config.max_length:
        raise ValueError(f"prompts must have between 1 and {config.max_length - 1} tokens, got {lengths.tolist()}")
    size = int(min(lengths.max() + max_new_tokens, config.max_length)) if size is None else size
    padded = -(-int(lengths.max()) // prefill) * prefill
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache, hidden = decoder.init_cache(config, len(prompts), size, dtype), None
    for first in range(0, padded, prefill):
        positions = np.broadcast_to(np.arange(first, first + prefill, dtype=np.int32), (len(prompts), prefill))
        here, cache = _read(config, parameters, cache, tokens[:, first : first + prefill], positions, lengths, dtype)
        is_last = ((lengths - 1) // prefill * prefill == first)[:, None]
        hidden = here if hidden is None else jnp.where(is_last, here, hidden)
    keys = jax.random.split(jax.random.key(sampling.seed), len(prompts)) if keys is None else keys
    # A row may go on to the end of the context, and no row further than it was asked to.
    limits = np.minimum(max_new_tokens, size - lengths)
    new_tokens = min(max_new_tokens, size - 1)
    ids = np.asarray(
        _continue(
            config, sampling, parameters, cache, hidden, lengths, limits, np.array(stop, np.int32), new_tokens, keys
        )
    )
    return [row[: np.argmax(row < 0)] if (row < 0).any() else row for row in ids]
