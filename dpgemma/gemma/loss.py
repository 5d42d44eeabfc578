"""Next-token cross-entropy against the tied embedding, in vocabulary chunks."""

import jax
import jax.numpy as jnp

from dpgemma.gemma.layers import PRECISION, soft_cap

CHUNK = 8192


def _chunk_size(vocab_size: int, target: int) -> int:
    """The largest divisor of the vocabulary in [target / 2, target], else target itself (the tail is then padded)."""
    if vocab_size <= target:
        return vocab_size
    return next((c for c in range(target, target // 2, -1) if vocab_size % c == 0), target)


def cross_entropy(hidden, embedding_VxD, targets, *, final_cap: float | None = None, chunk: int = CHUNK):
    """Negative log-likelihood [..., T] in nats of targets [..., T] given hidden states [..., T, D].

    Logits exist for `chunk` words of the vocabulary at a time, in the forward and in the backward pass: a running maximum and a
    rescaled sum of exponentials are carried across the chunks (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3).
    """
    vocab_size, width = embedding_VxD.shape
    size = _chunk_size(vocab_size, chunk)
    count = -(-vocab_size // size)

    def capped_logits(words, equation):
        words = words.astype(hidden.dtype)
        z = jnp.einsum(equation, hidden, words, precision=PRECISION, preferred_element_type=jnp.float32)
        return soft_cap(z, final_cap)

    @jax.checkpoint  # without it the backward pass would keep every chunk's logits
    def accumulate(carry, xs):
        running_max, running_sum = carry
        words_CxD, first = xs
        z = capped_logits(words_CxD, "...d,cd->...c")
        z = jnp.where(first + jnp.arange(size) < vocab_size, z, -jnp.inf)
        new_max = jax.lax.stop_gradient(jnp.maximum(running_max, z.max(axis=-1)))
        running_sum = running_sum * jnp.exp(running_max - new_max) + jnp.exp(z - new_max[..., None]).sum(axis=-1)
        return (new_max, running_sum), None

    words = jnp.pad(embedding_VxD, ((0, count * size - vocab_size), (0, 0))).reshape(count, size, width)
    start = (jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape))
    if count == 1:
        (maximum, total), _ = accumulate(start, (words[0], 0))
    else:
        (maximum, total), _ = jax.lax.scan(accumulate, start, (words, jnp.arange(count) * size))
    return maximum + jnp.log(total) - capped_logits(embedding_VxD[targets], "...d,...d->...")
