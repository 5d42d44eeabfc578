"""Next-token cross-entropy against the tied embedding, in vocabulary chunks where all logits would not fit."""

import jax
import jax.numpy as jnp

from dpgemma.gemma.layers import PRECISION, soft_cap

CHUNK = 8192
# Up to this many logits (128 MiB in float32) are kept for the backward pass; more are made anew, chunk by chunk.
MOST_LOGITS = 2**25


def _chunk_size(vocab_size: int, target: int) -> int:
    """The largest divisor of the vocabulary in [target / 2, target], else target itself (the tail is then padded)."""
    if vocab_size <= target:
        return vocab_size
    return next((c for c in range(target, target // 2, -1) if vocab_size % c == 0), target)


def cross_entropy(hidden, embedding_VxD, targets, *, final_cap: float | None = None, chunk: int | None = None):
    """Negative log-likelihood [..., T] in nats of targets [..., T] given hidden states [..., T, D].

    Args:
      chunk: words of the vocabulary whose logits exist at a time, in the forward and in the backward pass: a running maximum and a
        rescaled sum of exponentials are carried across the chunks (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3). By
        default all of them where they are few.
    """
    # One axis of rows: XLA's CPU backend is faster with matrices.
    losses = _cross_entropy(hidden.reshape(-1, hidden.shape[-1]), embedding_VxD, targets.reshape(-1), final_cap, chunk)
    return losses.reshape(targets.shape)


def _cross_entropy(hidden_NxD, embedding_VxD, targets_N, final_cap: float | None, chunk: int | None):
    vocab_size, width = embedding_VxD.shape

    def capped_logits(words, equation):
        words = words.astype(hidden_NxD.dtype)
        z = jnp.einsum(equation, hidden_NxD, words, precision=PRECISION, preferred_element_type=jnp.float32)
        return soft_cap(z, final_cap)

    if chunk is None and targets_N.size * vocab_size <= MOST_LOGITS:
        z = capped_logits(embedding_VxD, "nd,vd->nv")
        return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, targets_N[:, None], axis=-1)[:, 0]

    size = _chunk_size(vocab_size, chunk or CHUNK)
    count = -(-vocab_size // size)

    @jax.checkpoint  # without it the backward pass would keep every chunk's logits
    def accumulate(carry, xs):
        running_max, running_sum = carry
        words_CxD, first = xs
        z = capped_logits(words_CxD, "nd,cd->nc")
        z = jnp.where(first + jnp.arange(size) < vocab_size, z, -jnp.inf)
        new_max = jax.lax.stop_gradient(jnp.maximum(running_max, z.max(axis=-1)))
        running_sum = running_sum * jnp.exp(running_max - new_max) + jnp.exp(z - new_max[:, None]).sum(axis=-1)
        return (new_max, running_sum), None

    words = jnp.pad(embedding_VxD, ((0, count * size - vocab_size), (0, 0))).reshape(count, size, width)
    start = (jnp.full(targets_N.shape, -jnp.inf), jnp.zeros(targets_N.shape))
    (maximum, total), _ = jax.lax.scan(accumulate, start, (words, jnp.arange(count) * size))
    return maximum + jnp.log(total) - capped_logits(embedding_VxD[targets_N], "nd,nd->n")
