"""The rows of canaries that are text, or that stand where text stands."""

from collections.abc import Sequence

import numpy as np

from accounting.errors import InputError
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import ByteTokenizer, Tokenizer
from dpgemma.privacy import keystream

# Bytes that UTF-8 never has (RFC 3629), so that no text holds them.
_NO_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
# Names of tokens that Gemma's tokenizers keep for nobody.
_UNUSED = tuple(f"<unused{i}>" for i in range(100))


def without_text(count: int, length: int) -> dict[str, np.ndarray]:
    """Rows in which nothing is scored."""
    return {TOKENS: np.zeros((count, length), np.int32), SCORED: np.zeros((count, length), bool)}


def random_tokens(count: int, length: int, tokenizer: Tokenizer, seed: bytes) -> dict[str, np.ndarray]:
    """Rows of tokens drawn uniformly from those of ordinary text, all of them scored."""
    specials = (tokenizer.pad, tokenizer.eos, tokenizer.bos)
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), np.array(specials, np.int32))
    words = keystream.uniform_uint64(keystream.derive(seed, "tokens"), 0, count * length)
    tokens = ids[(words % np.uint64(len(ids))).astype(np.int64)].reshape(count, length)
    return {TOKENS: tokens, SCORED: np.ones(tokens.shape, bool)}


def new_tokens(count: int, length: int, tokenizer: Tokenizer, vocab_size: int, seed: bytes) -> dict[str, np.ndarray]:
    """Rows of random tokens that end in one which no text has, the only one that is scored (Panda et al. 2025, arXiv
    2503.06808).

    Args:
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: the vocabulary has no such token.
    """
    ids = unused_ids(tokenizer, vocab_size)
    if not len(ids):
        raise InputError(
            "the vocabulary has no token that texts never hold: give `canary_kind`=random_tokens or synthetic"
        )
    rows = random_tokens(count, length, tokenizer, seed)
    rows[TOKENS][:, -1] = np.resize(ids, count)
    rows[SCORED][:, :-1] = False
    return rows


def unused_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Ids int32 that the tokenizer gives to no text of UTF-8, ascending.

    >>> len(unused_ids(ByteTokenizer(), vocab_size=260))
    13
    """
    if isinstance(tokenizer, ByteTokenizer):
        return np.array([byte + tokenizer.vocab_size - 256 for byte in _NO_UTF8], np.int32)
    named = [i for i in map(tokenizer.token_id, _UNUSED) if i is not None and 0 <= i < vocab_size]
    return np.array(sorted({*named, *range(tokenizer.vocab_size, vocab_size)}), np.int32)


def of_texts(texts: Sequence[np.ndarray], length: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """A row of each text's ids and the end behind them, cut at `length`."""
    tokens = np.full((len(texts), length), tokenizer.pad, np.int32)
    scored = np.zeros(tokens.shape, bool)
    for row, mask, text in zip(tokens, scored, texts, strict=True):
        ids = np.append(text, tokenizer.eos)[:length]
        row[: len(ids)], mask[: len(ids)] = ids, True
    return {TOKENS: tokens, SCORED: scored}
