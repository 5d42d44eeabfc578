"""From `data` and `privacy_unit` to privacy units of text."""

from typing import Any

from dpgemma.choices import AUTO, EXAMPLE, REFUSE, SEQUENCE, USER
from dpgemma.data import readers
from dpgemma.data.source import InMemory
from dpgemma.data.text import examples, grouped, packing
from dpgemma.data.text.grouped import Grouped, Limits
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import Tokenizer, check_ids


def read(
    privacy_unit: str, data: str, text_field: str, tokenizer: Tokenizer, length: int, vocab_size: int
) -> tuple[str, InMemory]:
    """Returns the name of the privacy unit ("auto" resolved) and the units of `data`.

    Args:
      privacy_unit: "sequence" packs documents into rows; "example" gives every record a row; "auto" takes the latter
        where the first record has the fields of an example. The choice is one of format and never depends on what the
        fields hold.

    Raises:
      InputError: no data, records without the fields, or tokens that the model's embedding of `vocab_size` rows does
        not have.
    """
    if privacy_unit == AUTO:
        first: dict[str, Any] = next(iter(readers.records(data, text_field)), {})
        privacy_unit = EXAMPLE if examples.is_example(first) else SEQUENCE
    if privacy_unit == EXAMPLE:
        made = examples.to_rows(readers.records(data, text_field), tokenizer, length, text_field)
    else:
        made = packing.pack(readers.documents(data, text_field), tokenizer, length)
    check_ids(made.columns[TOKENS], vocab_size)
    return privacy_unit, made


def read_grouped(
    privacy_unit: str,
    data: str,
    text_field: str,
    tokenizer: Tokenizer,
    length: int,
    vocab_size: int,
    limits: Limits,
    *,
    user_field: str | None = None,
    records_without_user: str | None = None,
) -> Grouped:
    """The units of `data` that may have several rows.

    Args:
      privacy_unit: "document", or "user" with the field that names a record's user.

    Raises:
      InputError: as read; or records without a user, unless they are to be units of their own.
    """
    records = readers.records(data, text_field)
    if privacy_unit == USER:
        assert user_field is not None
        without = records_without_user or REFUSE
        made = grouped.by_user(records, tokenizer, length, text_field, user_field, without, limits)
    else:
        made = grouped.by_document(records, tokenizer, length, text_field, limits)
    check_ids(made.units.columns[TOKENS], vocab_size)
    return made


def with_nothing_to_learn(units: InMemory) -> str | None:
    """Whether "some" or "all" rows have no scored token; None where each has one. This is a fact about private data."""
    learn = units.columns[SCORED].any(axis=1)
    return None if learn.all() else "some" if learn.any() else "all"
