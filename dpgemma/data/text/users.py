"""Whom a record belongs to."""

from typing import Any

from accounting.errors import InputError


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
