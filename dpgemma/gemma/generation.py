"""Sampling text from a decoder, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(config: GemmaConfig, parameters, tokens, length):
    """Logits [V] that follow the first `length` of tokens [T]; causal, so what comes after does not matter."""
    hidden = decoder.hidden_states(config, parameters, tokens)
    return decoder.logits(config, parameters, hidden[length - 1])


def generate(
    config: GemmaConfig, parameters, prompt: np.ndarray, max_new_tokens: int, *, temperature: float, seed: int, stop: int, pad: int
) -> np.ndarray:
    """Up to max_new_tokens ids that continue prompt [P], ended by `stop`, which is left out.

    Args:
      prompt: ids, beginning with bos; prompt and continuation together must fit the model's context.
      temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
    """
    size = len(prompt) + max_new_tokens
    if size > config.max_length:
        raise ValueError(f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {config.max_length}")
    tokens = np.full(size, pad, np.int32)
    tokens[: len(prompt)] = prompt
    key = jax.random.key(seed)
    for length in range(len(prompt), size):
        logits = _next_logits(config, parameters, jnp.asarray(tokens), length)
        if temperature == 0:
            token = int(jnp.argmax(logits))
        else:
            token = int(jax.random.categorical(jax.random.fold_in(key, length), logits / temperature))
        if token == stop:
            return tokens[len(prompt) : length]
        tokens[length] = token
    return tokens[len(prompt) :]
