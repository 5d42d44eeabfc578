"""Which passages of its training data a model continues word for word.

The test of the Gemma reports (Gemma 3, arXiv 2503.19786, section 6; VaultGemma's card): the model is given 50 tokens of
a training text, takes the likeliest token each time, and has memorised the passage if the next 50 are those of the text
(exactly), or differ from them by an edit distance of at most 10 % (approximately).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.text.passages import Passage
from dpgemma.gemma import generation
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.next_token import Sampling

# Share of a suffix that may differ.
_NEAR = 0.1
_AT_ONCE = 256


def edit_distances(written: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Levenshtein distance of every row of one array to its row of another, by the textbook recursion on all at once.

    >>> edit_distances(np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1, 2, 3], [2, 3, 4]]))
    array([0, 2])

    Args:
      written, wanted: int [n, a] and [n, b].

    Returns:
      int [n].
    """
    count, columns = wanted.shape
    above = np.broadcast_to(np.arange(columns + 1), (count, columns + 1)).copy()
    for i in range(written.shape[1]):
        here = np.empty_like(above)
        here[:, 0] = i + 1
        for j in range(columns):
            differs = written[:, i] != wanted[:, j]
            here[:, j + 1] = np.minimum(np.minimum(above[:, j + 1], here[:, j]) + 1, above[:, j] + differs)
        above = here
    return above[:, -1]


def memorised(
    config: GemmaConfig,
    parameters: Any,
    passages: Sequence[Passage],
    *,
    bos: int,
    dtype: str = "float32",
    advance: Callable[[int], None] = lambda passages: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the model continues each passage exactly, and approximately: bool [n] each.

    Args:
      advance: is told how many more passages were continued.
    """
    exact, near = np.zeros(len(passages), bool), np.zeros(len(passages), bool)
    if not passages:
        return exact, near
    longest = max(len(passage.suffix) for passage in passages)
    room = min(config.max_length, 1 + longest + max(len(passage.prefix) for passage in passages))
    for first in range(0, len(passages), _AT_ONCE):
        chunk = list(passages[first : first + _AT_ONCE])
        filled = chunk + chunk[:1] * (min(_AT_ONCE, len(passages)) - len(chunk))
        written = generation.generate(
            config,
            parameters,
            [np.concatenate([[bos], passage.prefix]).astype(np.int32) for passage in filled],
            longest,
            Sampling(temperature=0),
            stop=(),
            dtype=jnp.dtype(dtype),
            prefill=64,
            keys=jax.random.split(jax.random.key(0), len(filled)),
            size=room,
        )
        here = slice(first, first + len(chunk))
        exact[here], near[here] = compared([passage.suffix for passage in chunk], written[: len(chunk)])
        advance(len(chunk))
    return exact, near


def compared(suffixes: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text begins with its suffix, exactly and approximately: bool [n] each.

    >>> wanted = np.arange(20)
    >>> other = np.where(wanted > 17, 99, wanted)
    >>> exact, near = compared([wanted] * 3, [wanted, other, other[::-1]])
    >>> exact.tolist(), near.tolist()
    ([True, False, False], [True, True, False])
    """
    pairs = list(zip(suffixes, written, strict=True))
    exact = np.array(
        [len(text) >= len(suffix) and bool((text[: len(suffix)] == suffix).all()) for suffix, text in pairs]
    )
    near = exact.copy()
    for length in {len(suffix) for suffix in suffixes}:
        these = [i for i, (suffix, text) in enumerate(pairs) if len(suffix) == length <= len(text) and not exact[i]]
        if these:
            texts, wanted = np.stack([written[i][:length] for i in these]), np.stack([suffixes[i] for i in these])
            near[these] = edit_distances(texts, wanted) <= math.floor(_NEAR * length)
    return exact, near
