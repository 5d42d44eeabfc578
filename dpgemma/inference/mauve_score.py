"""MAUVE of two collections of texts (Pillutla et al. 2021, arXiv 2102.01454), by the package mauve-text.

Features of a text are the mean of the model's last hidden states. With another model the figures are others, so they
compare corpora that were made with one, and are not those of papers, whose features come from larger models.
"""

import importlib.util
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.text.tokenizer import utf8
from dpgemma.gemma import decoder
from dpgemma.inference.models import Model

# Of each collection; more change the figure little, and clustering takes time with the square.
MOST_TEXTS = 2000
# So many for each cluster, both collections together: with fewer the clustering says that it has too few.
_TEXTS_OF_A_CLUSTER = 40
_BATCH = 64


def is_installed() -> bool:
    """Whether the package is there: pip install 'dpgemma[mauve]'."""
    return importlib.util.find_spec("mauve") is not None


def features(model: Model, texts: Sequence[str], length: int) -> np.ndarray:
    """float32 [n, D]: the mean over each text's tokens, of which the first `length` are read."""
    tokenizer = model.require_tokenizer()
    length = min(length, model.config.max_length)

    @jax.jit
    def means(parameters: object, tokens: jax.Array, counts: jax.Array) -> jax.Array:
        states = decoder.hidden_states(model.config, parameters, tokens)  # type: ignore[arg-type]
        real = jnp.arange(tokens.shape[1]) < counts[:, None]
        return jnp.where(real[..., None], states, 0).sum(1) / counts[:, None]

    parameters, found = jax.device_put(model.parameters), []
    for first in range(0, len(texts), _BATCH):
        tokens, counts = np.full((_BATCH, length), tokenizer.pad, np.int32), np.ones(_BATCH, np.int32)
        for row, text in enumerate(texts[first : first + _BATCH]):
            ids = np.concatenate([[tokenizer.bos], tokenizer.encode(utf8(text))])[:length]
            tokens[row, : len(ids)], counts[row] = ids, len(ids)
        found.append(np.asarray(means(parameters, tokens, counts)))
    return np.concatenate(found)[: len(texts)]


def score(model: Model, some: Sequence[str], others: Sequence[str], length: int) -> float | None:
    """From 0 to 1, which is alike; None for too few texts to be clustered.

    Args:
      length: tokens of a text that are read.
    """
    import mauve

    some, others = some[:MOST_TEXTS], others[:MOST_TEXTS]
    clusters = (len(some) + len(others)) // _TEXTS_OF_A_CLUSTER
    if clusters < 2:
        return None
    result = mauve.compute_mauve(
        p_features=features(model, some, length),
        q_features=features(model, others, length),
        num_buckets=clusters,
        verbose=False,
    )
    return float(result.mauve) if math.isfinite(result.mauve) else None
