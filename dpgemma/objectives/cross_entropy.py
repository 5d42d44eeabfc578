"""Next-token cross-entropy against the tied embedding, in vocabulary chunks where all logits would not fit."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpgemma.gemma.blocks.layers import soft_cap
from dpgemma.privacy import operations
from dpgemma.privacy.operations import PRECISION

CHUNK = 8192
# Up to this many logits (128 MiB in float32) are kept for the backward pass; more are made anew, chunk by chunk.
MOST_LOGITS = 2**25

_dot = functools.partial(jnp.einsum, precision=PRECISION, preferred_element_type=jnp.float32)


def _chunk_size(vocab_size: int, target: int) -> int:
    """The largest divisor of the vocabulary in [target / 2, target], else target itself (the tail is then padded)."""
    if vocab_size <= target:
        return vocab_size
    return next((c for c in range(target, target // 2, -1) if vocab_size % c == 0), target)


def cross_entropy(
    hidden: jax.Array,
    embedding_VxD: jax.Array,
    targets: jax.Array,
    *,
    final_cap: float | None = None,
    chunk: int | None = None,
    is_spread: bool = False,
) -> Any:
    """Negative log-likelihood [..., T] in nats of targets [..., T] given hidden states [..., T, D].

    Args:
      chunk: words of the vocabulary whose logits exist at a time, in the forward and in the backward pass; by default
        all of them where they are few.
      is_spread: whether the vocabulary is spread over devices, so that each has its part of all logits.
    """
    vocab_size = embedding_VxD.shape[0]
    if chunk is None:
        # A chunk of a vocabulary that is spread would lie on one device, and would have to go to all others.
        chunk = vocab_size if is_spread or targets.size * vocab_size <= MOST_LOGITS else CHUNK
    core = CrossEntropy(final_cap, _chunk_size(vocab_size, chunk), is_spread)
    # One axis of rows: XLA's CPU backend is faster with matrices.
    losses = operations.head(core, hidden.reshape(-1, hidden.shape[-1]), embedding_VxD, targets.reshape(-1))
    return losses.reshape(targets.shape)


def losses_and_hits(
    hidden: jax.Array, embedding_VxD: jax.Array, targets: jax.Array, *, final_cap: float | None, is_spread: bool
) -> tuple[Any, Any]:
    """For evaluation: negative log-likelihoods [..., T] in nats, and whether no word is likelier than the target.

    Args:
      hidden, embedding_VxD, targets, final_cap, is_spread: as cross_entropy takes them.
    """
    vocab_size = embedding_VxD.shape[0]
    chunk = vocab_size if is_spread or targets.size * vocab_size <= MOST_LOGITS else CHUNK
    core = CrossEntropy(final_cap, _chunk_size(vocab_size, chunk), is_spread)
    log_total, of_target, _, likeliest = core.scores(
        hidden.reshape(-1, hidden.shape[-1]), embedding_VxD, targets.reshape(-1), with_likeliest=True
    )
    return (log_total - of_target).reshape(targets.shape), likeliest.reshape(targets.shape) == targets


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The two passes of the loss over all words, `chunk` of them at a time, as operations.head takes them."""

    final_cap: float | None
    chunk: int
    is_spread: bool = False

    def _chunks(self, embedding_VxD: jax.Array) -> tuple[Any, Any]:
        """The words as [K, C, D], zeros behind the last, and the number [K] of each chunk's first word."""
        vocab_size, width = embedding_VxD.shape
        count = -(-vocab_size // self.chunk)
        padded = jnp.pad(embedding_VxD, ((0, count * self.chunk - vocab_size), (0, 0)))
        return padded.reshape(count, self.chunk, width), jnp.arange(count) * self.chunk

    def _logits(self, hidden_NxD: jax.Array, words_CxD: jax.Array) -> Any:
        return soft_cap(_dot("nd,cd->nc", hidden_NxD, words_CxD.astype(hidden_NxD.dtype)), self.final_cap)

    def forward(self, hidden_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array) -> tuple[Any, Any]:
        """Losses [N] and what the backward pass needs."""
        log_total, of_target, z, _ = self.scores(hidden_NxD, embedding_VxD, targets_N)
        return log_total - of_target, (hidden_NxD, embedding_VxD, targets_N, log_total, z)

    def scores(
        self, hidden_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array, *, with_likeliest: bool = False
    ) -> tuple[Any, Any, Any, Any]:
        """Of every row of hidden states: the logarithm of the sum of exponentials of its logits, and the target's
        logit, both [N]; the logits [N, V] where one chunk holds them, else None; and where it is asked for, the number
        of the likeliest word [N].

        A running maximum and a rescaled sum of exponentials are carried across the chunks (Milakov and Gimelshein 2018,
        arXiv 1805.02867, algorithm 3); logits are kept only where one chunk holds them all.
        """
        vocab_size = embedding_VxD.shape[0]
        if self.chunk == vocab_size:
            z = self._logits(hidden_NxD, embedding_VxD)
            log_total = jax.nn.logsumexp(z, axis=-1)
            if self.is_spread:  # a sum, which every device takes over its own words
                of_target = jnp.where(targets_N[:, None] == jnp.arange(vocab_size), z, 0.0).sum(axis=-1)
            else:
                of_target = jnp.take_along_axis(z, targets_N[:, None], axis=-1)[:, 0]
            return log_total, of_target, z, z.argmax(axis=-1) if with_likeliest else None

        def accumulate(carry: Any, xs: Any) -> tuple[Any, Any]:
            running_max, running_sum, likeliest = carry
            words_CxD, first = xs
            z = self._logits(hidden_NxD, words_CxD)
            z = jnp.where(first + jnp.arange(self.chunk) < vocab_size, z, -jnp.inf)
            new_max = jnp.maximum(running_max, z.max(axis=-1))
            running_sum = running_sum * jnp.exp(running_max - new_max) + jnp.exp(z - new_max[:, None]).sum(axis=-1)
            if with_likeliest:
                likeliest = jnp.where(z.max(axis=-1) > running_max, first + z.argmax(axis=-1), likeliest)
            return (new_max, running_sum, likeliest), None

        first_word = jnp.zeros(targets_N.shape, jnp.int32) if with_likeliest else None
        start = (jnp.full(targets_N.shape, -jnp.inf), jnp.zeros(targets_N.shape), first_word)
        (maximum, total, likeliest), _ = jax.lax.scan(accumulate, start, self._chunks(embedding_VxD))
        log_total = maximum + jnp.log(total)
        of_target = soft_cap(
            _dot("nd,nd->n", hidden_NxD, embedding_VxD[targets_N].astype(hidden_NxD.dtype)), self.final_cap
        )
        return log_total, of_target, None, likeliest

    def backward(self, residuals: Any, d_losses_N: jax.Array, use: Any) -> tuple[Any, Any]:
        """The gradient [N, D] by the hidden states, and `use(delta [N, C])` of every chunk, stacked; delta is the
        gradient by the logits before the cap, in the type of the hidden states."""
        hidden_NxD, embedding_VxD, targets_N, log_total, kept = residuals

        def of_chunk(words_CxD: jax.Array, first: Any, z: jax.Array) -> tuple[Any, Any]:
            number = first + jnp.arange(self.chunk)
            delta = jnp.exp(z - log_total[:, None]) - (targets_N[:, None] == number)
            if self.final_cap is not None:
                delta = delta * (1 - (z / self.final_cap) ** 2)
            delta = jnp.where(number < embedding_VxD.shape[0], delta * d_losses_N[:, None], 0.0).astype(
                hidden_NxD.dtype
            )
            return _dot("nc,cd->nd", delta, words_CxD.astype(hidden_NxD.dtype)), use(delta)

        def add_chunk(d_hidden: Any, xs: Any) -> tuple[Any, Any]:
            words_CxD, first = xs
            one, used = of_chunk(words_CxD, first, self._logits(hidden_NxD, words_CxD))
            return d_hidden + one, used

        if kept is not None:
            d_hidden, used = of_chunk(embedding_VxD, 0, kept)
            used = used[None]
        else:
            d_hidden, used = jax.lax.scan(add_chunk, jnp.zeros(hidden_NxD.shape), self._chunks(embedding_VxD))
        return d_hidden.astype(hidden_NxD.dtype), used
