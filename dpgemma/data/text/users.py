"""Whom a record belongs to, and which records are kept where it is several users.

A. Ganesh et al. 2025, "It's My Data Too: Private ML for Datasets with Multi-User Training Examples"
(arXiv 2503.03622): which users a record names is public, so records can be chosen by it.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from accounting.errors import InputError


def users_of(record: dict[str, Any], field: str, number: int, *, several: bool = False) -> tuple[str, ...]:
    """Whom a record belongs to; empty if it does not say. Numbers and texts that read alike are one user.

    >>> users_of({"author": {"id": 7}}, "author.id", 1), users_of({"author.id": "7"}, "author.id", 1)
    (('7',), ('7',))
    >>> users_of({"to": ["b", "a", "b", None]}, "to", 1, several=True)
    ('a', 'b')

    Args:
      number: of the record, for messages.
      several: whether a list may name several.

    Raises:
      InputError: several users where one is expected, or a value that names none.
    """
    value: Any = record
    if field in record:
        value = record[field]
    else:
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    values = value if several and isinstance(value, (list, tuple)) else [value]
    names = (_name(one, field, number) for one in values)
    return tuple(sorted({name for name in names if name is not None}))


def _name(value: Any, field: str, number: int) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is not None and not isinstance(value, (str, int, float)):
        raise InputError(
            f"record {number} of the data has no single user in the field {field!r}: give one with a text or a number,"
            " or `ownership`=public if it may be a list of users whose names are no secret"
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" or value != value else str(value)


def within_limit(users: Iterable[Sequence[str]], limit: int) -> list[int]:
    """Numbers of the records that are kept, so that every user has at most `limit`: each in its turn, if none of its
    users has as many already. Records that name nobody are kept.

    Formal guarantee: the result is a function of the users' names alone, and holds at most `limit` records of each.
    Tested by tests/data/grouped_test.py::test_records_of_several_users_are_kept_up_to_the_limit_of_each.

    >>> within_limit([("a", "b"), ("a",), ("a", "c"), ("c",), ()], 2)
    [0, 1, 3, 4]
    """
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for number, names in enumerate(users):
        if all(counts[name] < limit for name in names):
            counts.update(names)
            kept.append(number)
    return kept
