"""Units of several rows: a document with all of its text, or a user with all records that belong to him.

Formal guarantee: the rows of a unit are a function of its own records, of its number and of a secret key, and hold
nothing of another unit. So changing the records of one unit changes one privacy unit, and whether a row is kept where a
unit has too many tells nothing of the others. Tested by
tests/data/grouped_test.py::test_a_unit_s_records_touch_no_other_unit.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.choices import FIRST_ROWS, REFUSE
from dpgemma.data.source import InMemory
from dpgemma.data.text import examples
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import Tokenizer
from dpgemma.privacy import keystream

Piece = tuple[np.ndarray, np.ndarray]  # tokens and scored of one record, [n] each


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many rows of a unit are kept.

    Attributes:
      rows_per_unit: k, at most.
      rows_kept: "uniform" for k rows at random, "first" for the first k.
      secret: key of the choice.
    """

    rows_per_unit: int
    rows_kept: str
    secret: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Units, and what is left out of them: facts about private data.

    Attributes:
      units: their rows.
      rows_left_out: how many, of units that have more than are kept.
      units_cut: how many units have more.
    """

    units: InMemory
    rows_left_out: int
    units_cut: int


def by_document(
    records: Iterable[dict[str, Any]], tokenizer: Tokenizer, length: int, text_field: str, limits: Limits
) -> Grouped:
    """Every record as a unit, whatever its length.

    Raises:
      InputError: no records, or one without text; names it by its number.
    """
    pieces = [[piece] for piece in _pieces(records, tokenizer, text_field)]
    return _grouped(pieces, tokenizer.pad, length, limits)


def by_user(
    records: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    length: int,
    text_field: str,
    user_field: str,
    records_without_user: str,
    limits: Limits,
) -> Grouped:
    """All records with the same value in a field as a unit, in the order in which values first occur.

    Texts of a user follow each other in his rows; a record with prompt and response, or with messages, begins a row.

    Args:
      user_field: name of a field, or names within each other joined by dots.
      records_without_user: "refuse", or "own" for units of their own.

    Raises:
      InputError: no records, one without text, one without the field, or one that belongs to several users; names it by
        its number.
    """
    kept = list(records)
    pieces: dict[Any, list[Piece]] = {}
    for number, (record, piece) in enumerate(zip(kept, _pieces(kept, tokenizer, text_field), strict=True), 1):
        user = user_of(record, user_field, number)
        if user is None and records_without_user == REFUSE:
            raise InputError(
                f"record {number} of the data has no user in the field {user_field!r}: give `records_without_user`=own"
                " to make such records units of their own, or correct `user_field`"
            )
        pieces.setdefault(number if user is None else user, []).append(piece)
    return _grouped(list(pieces.values()), tokenizer.pad, length, limits)


def user_of(record: dict[str, Any], field: str, number: int) -> str | None:
    """Whom a record belongs to; None if it does not say. Numbers and texts that read alike are one user.

    >>> user_of({"author": {"id": 7}}, "author.id", 1), user_of({"author.id": "7"}, "author.id", 1)
    ('7', '7')

    Args:
      number: of the record, for messages.

    Raises:
      InputError: several users, or a value that names none.
    """
    value: Any = record
    if field in record:
        value = record[field]
    else:
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "" or value != value:
        return None
    if not isinstance(value, (str, int, float)):
        raise InputError(
            f"record {number} of the data has no single user in the field {field!r}: give one with a text or a number"
        )
    return str(value)


def _pieces(records: Iterable[dict[str, Any]], tokenizer: Tokenizer, text_field: str) -> Iterable[Piece]:
    for number, record in enumerate(records, start=1):
        try:
            yield examples.encoded(record, tokenizer, text_field)
        except InputError as error:
            raise InputError(f"record {number} of the data: {error}") from None


def _grouped(units: Sequence[Sequence[Piece]], pad: int, length: int, limits: Limits) -> Grouped:
    if not units:
        raise InputError("the data are empty: there is no record to train on")
    key, kept, counts = keystream.derive(limits.secret, "rows of units"), [], []
    left_out = cut = 0
    for number, pieces in enumerate(units):
        rows = _rows(pieces, pad, length)
        chosen = rows
        if len(rows) > limits.rows_per_unit:
            chosen = [rows[i] for i in _chosen(len(rows), number, key, limits)]
            left_out, cut = left_out + len(rows) - len(chosen), cut + 1
        kept += chosen
        counts.append(len(chosen))
    tokens, scored = (np.stack(column) for column in zip(*kept, strict=True))
    first = np.concatenate([[0], np.cumsum(counts)])
    return Grouped(InMemory({TOKENS: tokens, SCORED: scored}, first, limits.rows_per_unit), left_out, cut)


def _rows(pieces: Sequence[Piece], pad: int, length: int) -> list[Piece]:
    """The rows of one unit: those with something to learn, or one empty row."""
    texts = [piece for piece in pieces if piece[1].all() and len(piece[0]) > 1]  # eos alone is no text
    streams = [(np.concatenate([t for t, _ in texts]), np.concatenate([s for _, s in texts]))] if texts else []
    streams += [piece for piece in pieces if not piece[1].all()]
    rows = []
    for tokens, scored in streams:
        fill = (0, -len(tokens) % length)
        whole = np.pad(tokens, fill, constant_values=pad), np.pad(scored, fill)
        parts = (column.reshape(-1, length) for column in whole)
        rows += [(row, learned) for row, learned in zip(*parts, strict=True) if learned.any()]
    return rows or [(np.full(length, pad, np.int32), np.zeros(length, bool))]


def _chosen(count: int, unit: int, key: bytes, limits: Limits) -> np.ndarray:
    """Numbers of the rows that are kept of a unit with so many, ascending."""
    if limits.rows_kept == FIRST_ROWS:
        return np.arange(limits.rows_per_unit)
    order = np.argsort(keystream.uniform_uint64(key, unit, count), kind="stable")
    return np.sort(order[: limits.rows_per_unit])
