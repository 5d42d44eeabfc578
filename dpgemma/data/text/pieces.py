"""Records as tokens: a piece each, before anything is known of rows.

A token that the model is to learn is stored as its id t >= 0, another one as -1 - t.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from accounting.errors import InputError
from dpgemma.choices import REFUSE, SEQUENCE, USER
from dpgemma.data.formats import OnBad, refuse
from dpgemma.data.text import examples
from dpgemma.data.text.tokenizer import Tokenizer, utf8
from dpgemma.data.text.users import users_of


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become pieces, and pieces units.

    Attributes:
      privacy_unit: "sequence", "example", "document" or "user".
      length: tokens per row.
      text_field: field of a record that holds its text.
      user_field: field that names a record's user; fields within fields are joined by dots.
      records_without_user: "refuse", or "own" for units of their own.
      several_users: whether a record may be that of several users.
    """

    privacy_unit: str
    length: int
    text_field: str
    user_field: str | None = None
    records_without_user: str | None = None
    several_users: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """One record.

    Attributes:
      tokens: whole numbers [n], int32 or int16; those not to be learned as -1 - t.
      is_text: whether other text may follow it in its row; else it begins a row, and its last row ends with it.
      rows: of a piece that begins a row, rows of it in which something is learned.
      users: whose record it is; empty where the record names no user, or units are not users.
    """

    tokens: np.ndarray
    is_text: bool
    rows: int
    users: tuple[str, ...] = ()

    @property
    def user(self) -> str | None:
        """The only one that it belongs to, if it does."""
        return self.users[0] if self.users else None

    def narrowed(self) -> "Piece":
        """The piece with tokens of two bytes where they fit, as those of bytes do."""
        tokens = self.tokens
        fits = not tokens.size or (tokens.min() >= -(2**15) and tokens.max() < 2**15)
        return dataclasses.replace(self, tokens=tokens.astype(np.int16)) if fits else self


def unsigned(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether each is learned) of stored tokens.

    >>> unsigned(np.array([5, -1, -8], np.int32))
    (array([5, 0, 7], dtype=int32), array([ True, False, False]))
    """
    return stored ^ (stored >> 31), stored >= 0  # -1 - t has the bits of t, each reversed


def _users(record: dict[str, Any], number: int, reading: Reading) -> tuple[str, ...]:
    """Whose record it is.

    Raises:
      InputError: nobody's, where it has to be somebody's.
    """
    if reading.privacy_unit != USER:
        return ()
    assert reading.user_field is not None
    users = users_of(record, reading.user_field, number, several=reading.several_users)
    if not users and (reading.records_without_user or REFUSE) == REFUSE:
        raise InputError(
            f"record {number} of the data has no user in the field {reading.user_field!r}: give"
            " `records_without_user`=own to make such records units of their own, or correct `user_field`"
        )
    return users


def _piece(
    record: dict[str, Any], number: int, tokenizer: Tokenizer, reading: Reading, users: tuple[str, ...]
) -> Piece:
    """The piece of a record.

    Raises:
      InputError: a record without text.
    """
    if reading.privacy_unit == SEQUENCE:
        text = record.get(reading.text_field)
        if not isinstance(text, (bytes, str)):
            raise InputError(
                f"record {number} of the data has no text in field {reading.text_field!r}: see `text_field`, or"
                " `privacy_unit`=example for records with prompt and response or with messages"
            )
        tokens = tokenizer.encode(text if isinstance(text, bytes) else utf8(text))
        if tokens.size:
            tokens = np.append(tokens, np.int32(tokenizer.eos))
        return Piece(tokens, True, 0)
    try:
        ids, learned = examples.encoded(record, tokenizer, reading.text_field)
    except InputError as error:
        raise InputError(f"record {number} of the data: {error}") from None
    is_text = bool(learned.all()) and len(ids) > 1  # eos alone is no text
    rows = 0
    if not learned.all():
        rows = int(np.pad(learned, (0, -len(ids) % reading.length)).reshape(-1, reading.length).any(axis=1).sum())
    return Piece(np.where(learned, ids, -1 - ids), is_text, rows, users)


def of_records(
    records: Iterable[dict[str, Any]], tokenizer: Tokenizer, reading: Reading, on_bad: OnBad = refuse, first: int = 1
) -> Iterator[Piece]:
    """The pieces of records.

    Args:
      on_bad: told what is wrong with a record without text.
      first: number of the first record, for messages.

    Raises:
      InputError: a record without the user that it needs; what `on_bad` raises.
    """
    for number, record in enumerate(records, first):
        users = _users(record, number, reading)
        try:
            piece = _piece(record, number, tokenizer, reading, users)
        except InputError as bad:
            on_bad(bad)
        else:
            yield piece


PERCENTILES = (5, 25, 50, 75, 95, 100)


def lengths_of_records(lengths: np.ndarray, length: int) -> dict[str, Any]:
    """What is worth knowing of the lengths of records, in tokens, as JSON takes it.

    Args:
      lengths: int64 [n], of every record.
      length: of a row.

    Returns:
      "records", "row" (its length), "percentiles" (of PERCENTILES), "total", "longer" (records longer than a row) and
      "beyond" (their tokens behind the first row).
    """
    beyond = np.maximum(lengths - length, 0)
    return {
        "records": len(lengths),
        "row": length,
        "percentiles": [int(x) for x in np.percentile(lengths, PERCENTILES, method="inverted_cdf")]
        if len(lengths)
        else [],
        "total": int(lengths.sum()),
        "longer": int((beyond > 0).sum()),
        "beyond": int(beyond.sum()),
    }


class Pieces(Protocol):
    """All pieces of some data.

    Attributes:
      lengths: whole numbers [n], tokens of each.
      is_text: bool [n].
      rows: whole numbers [n], of pieces that begin a row.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def is_text(self) -> np.ndarray: ...

    @property
    def rows(self) -> np.ndarray: ...

    def owners(self) -> np.ndarray:
        """The unit of each piece where units are users, whole numbers [n] in the order of their first pieces."""
        ...

    def tokens(self, numbers: np.ndarray, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The tokens begin .. end - 1 (by default all) of some pieces joined, int32."""
        ...


@dataclasses.dataclass(frozen=True)
class InMemoryPieces:
    """Pieces that are held."""

    held: Sequence[Piece]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(piece.tokens) for piece in self.held], np.int64)

    @property
    def is_text(self) -> np.ndarray:
        return np.array([piece.is_text for piece in self.held], bool)

    @property
    def rows(self) -> np.ndarray:
        return np.array([piece.rows for piece in self.held], np.int64)

    def owners(self) -> np.ndarray:
        known: dict[Any, int] = {}
        names = (i if piece.user is None else piece.user for i, piece in enumerate(self.held))
        return np.array([known.setdefault(name, len(known)) for name in names], np.int64)

    def tokens(self, numbers: np.ndarray, begin: int = 0, end: int | None = None) -> np.ndarray:
        parts, before = [np.zeros(0, np.int32)], 0
        for i in numbers:
            tokens = self.held[i].tokens
            parts.append(tokens[max(0, begin - before) : None if end is None else max(0, end - before)])
            before += len(tokens)
        return np.concatenate(parts)
