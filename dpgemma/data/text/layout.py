"""Which tokens stand in which row of which unit.

Formal guarantee: where a unit is a row of packed text ("sequence"), every token lies in exactly one row. Where it is a
record ("example", "document") or a user, its rows hold nothing of another unit: they are a function of its own pieces
alone. Tested by tests/data/data_test.py::test_pitfall_19_every_token_lies_in_exactly_one_row,
tests/data/examples_test.py::test_pitfall_19_a_record_is_one_row_and_touches_no_other and
tests/data/grouped_test.py::test_a_unit_s_records_touch_no_other_unit and ::test_a_document_touches_no_other_document.
"""

import functools

import numpy as np

from dpgemma.choices import EXAMPLE, SEQUENCE, USER
from dpgemma.data.text.pieces import Pieces


class Layout:
    """Rows by number, those of a unit adjacent, made of pieces when they are asked for.

    Attributes:
      first: int64 [units + 1]; unit u has the rows first[u] .. first[u + 1] - 1, at least one.

    Args:
      pieces: all of them.
      privacy_unit: "sequence" for rows cut from all text joined, "example" for a row of each piece, cut at its end,
        "document" for as many rows as a piece needs, "user" first the rows of all texts of the user, joined in the
        order of the data, then the rows of every other record of his, of which only those with something to learn are
        kept.
      length: of a row.
      pad: id that fills rows up.
    """

    def __init__(self, pieces: Pieces, privacy_unit: str, length: int, pad: int) -> None:
        self._pieces, self._unit, self._length = pieces, privacy_unit, length
        self._empty = np.full(length, -1 - pad, np.int32)
        self._lengths, self._is_text, self._own_rows = pieces.lengths, pieces.is_text, pieces.rows
        count = len(self._lengths)
        if privacy_unit in (SEQUENCE, EXAMPLE):
            total = -(-int(self._lengths.sum()) // length) if privacy_unit == SEQUENCE else count
            self.first = np.arange(total + 1)
            return
        owners = pieces.owners() if privacy_unit == USER else np.arange(count)
        self._order = np.argsort(owners, kind="stable")
        units = int(owners.max(initial=-1)) + 1
        self._begin = np.searchsorted(owners[self._order], np.arange(units + 1))
        texts = np.bincount(owners, self._lengths * self._is_text, units).astype(np.int64)
        others = np.bincount(owners, self._own_rows, units).astype(np.int64)
        self._text_rows = -(-texts // length)
        counts = np.maximum(self._text_rows + others, 1)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self._of_unit = functools.lru_cache(maxsize=1)(self._pieces_of_unit)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Stored tokens [end - begin, length] of the rows begin .. end - 1."""
        if self._unit == SEQUENCE:
            return self._cut(self._text, begin, end)
        if self._unit == EXAMPLE:
            pieces = (self._pieces.tokens(np.array([i]), 0, self._length) for i in range(begin, end))
            return np.concatenate([self._padded(tokens) for tokens in pieces])
        found, row = [], begin
        unit = int(np.searchsorted(self.first, begin, "right")) - 1
        while row < end:
            stop = min(end, int(self.first[unit + 1]))
            found.append(self._rows_of_unit(unit, row - int(self.first[unit]), stop - int(self.first[unit])))
            row, unit = stop, unit + 1
        return np.concatenate(found)

    def _padded(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens as rows, at least one, the last one filled up."""
        rows = np.tile(self._empty, (max(1, -(-len(tokens) // self._length)), 1))
        rows.reshape(-1)[: len(tokens)] = tokens
        return rows

    def _cut(self, text: tuple[np.ndarray, np.ndarray], begin: int, end: int) -> np.ndarray:
        """Rows begin .. end - 1 of texts joined.

        Args:
          text: (numbers of the pieces, int64 [n + 1] where each begins in the joined text).
        """
        numbers, starts = text
        low, high = begin * self._length, min(end * self._length, int(starts[-1]))
        one, other = int(np.searchsorted(starts, low, "right")) - 1, int(np.searchsorted(starts, high, "left"))
        before = int(starts[one])
        return self._padded(self._pieces.tokens(numbers[one:other], low - before, high - before))

    @functools.cached_property
    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        """All pieces that hold something."""
        numbers = np.flatnonzero(self._lengths)
        return numbers, np.concatenate([[0], np.cumsum(self._lengths[numbers])])

    def _pieces_of_unit(self, unit: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        """(its texts as `_cut` takes them, its other pieces, int64 [n + 1] where the rows of each of these begin)."""
        own = self._order[self._begin[unit] : self._begin[unit + 1]]
        texts, others = own[self._is_text[own]], own[self._own_rows[own] > 0]
        starts = np.concatenate([[0], np.cumsum(self._lengths[texts])])
        return (texts, starts), others, np.concatenate([[0], np.cumsum(self._own_rows[others])])

    def _rows_of_unit(self, unit: int, begin: int, end: int) -> np.ndarray:
        texts, others, begins = self._of_unit(unit)
        of_texts, found = int(self._text_rows[unit]), []
        if begin < of_texts:
            found.append(self._cut(texts, begin, min(end, of_texts)))
        begin, end = max(begin - of_texts, 0), end - of_texts
        if end > begin and len(others):
            one, other = int(np.searchsorted(begins, begin, "right")) - 1, int(np.searchsorted(begins, end, "left"))
            made = [self._padded(self._pieces.tokens(others[i : i + 1])) for i in range(one, other)]
            learned = np.concatenate([rows[(rows >= 0).any(axis=1)] for rows in made])
            found.append(learned[begin - int(begins[one]) : end - int(begins[one])])
        elif end > begin:
            found.append(self._empty[None])
        return np.concatenate(found)
