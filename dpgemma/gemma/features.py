"""Features of texts under a model: the means of its last hidden states."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.text.tokenizer import Tokenizer, utf8
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig

_BATCH = 64


def of_texts(
    config: GemmaConfig, parameters: dict[str, Any], tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> np.ndarray:
    """float32 [n, D]: the mean over each text's tokens, of which the first `length` are read."""
    length = min(length, config.max_length)

    @jax.jit
    def means(parameters: dict[str, Any], tokens: jax.Array, counts: jax.Array) -> jax.Array:
        states = decoder.hidden_states(config, parameters, tokens)
        real = jnp.arange(tokens.shape[1]) < counts[:, None]
        return jnp.where(real[..., None], states, 0).sum(1) / counts[:, None]

    on_device, found = jax.device_put(parameters), []
    for first in range(0, len(texts), _BATCH):
        tokens, counts = np.full((_BATCH, length), tokenizer.pad, np.int32), np.ones(_BATCH, np.int32)
        for row, text in enumerate(texts[first : first + _BATCH]):
            ids = np.concatenate([[tokenizer.bos], tokenizer.encode(utf8(text))])[:length]
            tokens[row, : len(ids)], counts[row] = ids, len(ids)
        found.append(np.asarray(means(on_device, tokens, counts)))
    return np.concatenate(found)[: len(texts)]
