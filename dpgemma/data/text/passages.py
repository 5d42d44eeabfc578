"""Passages of rows that a model is asked to continue: a prefix, and what stands behind it in the data."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import Tokenizer

# Shapes of what identifies a person or opens a door; in the synthetic notes all of it is made up.
SHAPES = {
    "e-mail": re.compile(rb"[\w.+-]+@[\w-]+\.[\w.-]*\w"),
    "telephone": re.compile(rb"(?<![\d.])\+?\d[\d ()/-]{7,}\d"),
    "number": re.compile(rb"(?<![\d.])\d{6,}"),
    "password": re.compile(rb"(?i)(?<=password on file: )[^\s.]+"),
}
# A prefix with less than this says nothing of what follows.
_SHORTEST_PREFIX = 16


@dataclasses.dataclass(frozen=True)
class Passage:
    """What stands in a row.

    Attributes:
      prefix, suffix: ids int32.
    """

    prefix: np.ndarray
    suffix: np.ndarray

    @property
    def identity(self) -> bytes:
        """By which equal passages are found."""
        return self.prefix.tobytes() + b"|" + self.suffix.tobytes()


def first_passages(rows: Mapping[str, np.ndarray], prefix: int, suffix: int) -> list[Passage | None]:
    """The first passage of every row that has one: `prefix` tokens, and `suffix` scored ones behind them.

    >>> scored = np.array([[0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
    >>> found = first_passages({"tokens": np.arange(12).reshape(2, 6), "scored": scored}, prefix=2, suffix=2)
    >>> found[0].prefix.tolist(), found[0].suffix.tolist(), found[1]
    ([1, 2], [3, 4], None)
    """
    found: list[Passage | None] = []
    for row, scored in zip(rows[TOKENS], rows[SCORED], strict=True):
        begin = max(prefix, int(np.argmax(scored)))
        whole = scored[begin : begin + suffix]
        fits = len(whole) == suffix and whole.all()
        found.append(Passage(row[begin - prefix : begin], row[begin : begin + suffix]) if fits else None)
    return found


def shaped_passages(rows: Mapping[str, np.ndarray], prefix: int, tokenizer: Tokenizer) -> Iterator[tuple[str, Passage]]:
    """(shape, passage) of everything in the rows' scored text that has one of SHAPES, with up to `prefix` tokens before
    it.
    """
    for row, scored in zip(rows[TOKENS], rows[SCORED], strict=True):
        pieces = [tokenizer.decode(row[i : i + 1]) if scored[i] else b"\n" for i in range(len(row))]
        ends = np.cumsum([len(piece) for piece in pieces])
        text = b"".join(pieces)
        for shape, pattern in SHAPES.items():
            for match in pattern.finditer(text):
                begin, end = (int(np.searchsorted(ends, place, "right")) for place in (match.start(), match.end() - 1))
                if begin >= _SHORTEST_PREFIX:
                    yield shape, Passage(row[max(0, begin - prefix) : begin], row[begin : end + 1])
