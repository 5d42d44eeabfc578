"""Fields of records that look as if they named a person, where persons are not what is protected."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Words of a field's name, without "id", "name" and the like behind them.
_PEOPLE = {
    "account", "author", "citizen", "client", "customer", "donor", "employee", "member", "mrn", "owner", "participant",
    "patient", "person", "pupil", "recipient", "sender", "speaker", "student", "subject", "subscriber", "user",
    "username", "worker", "email",
}  # fmt: skip
_OTHER = {"id", "key", "no", "nr", "num", "number", "name", "hash", "uid", "uuid", "pseudonym", "ref", "index"}
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Values of a field that are told apart.
_MOST_VALUES = 1 << 20


def names_a_person(field: str) -> bool:
    """Whether a field's name says that it names a person.

    >>> [names_a_person(name) for name in ("user_id", "PatientNo", "author", "id", "user_agent", "authorship")]
    [True, True, True, False, False, False]
    """
    words = [word.lower() for word in _WORD.findall(field)] if _PLAIN.fullmatch(field) else []
    return bool(words) and words[0] in _PEOPLE and set(words[1:]) <= _OTHER


def is_an_id(field: str) -> bool:
    """Whether a field's name says that it tells something apart, be it persons or records."""
    words = [word.lower() for word in _WORD.findall(field)]
    return bool(words) and set(words) <= {"id", "uid", "uuid", "key"}


@dataclasses.dataclass
class People:
    """What was seen of such fields, private as it is.

    Attributes:
      fields: the first record's fields that look so; a fact about the form of the data.
      records: that were seen.
      values: hashes of each field's values.
    """

    fields: tuple[str, ...] = ()
    records: int = 0
    values: dict[str, set[int]] = dataclasses.field(default_factory=dict)

    def seen(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The records, looked at on their way."""
        for record in records:
            if not self.records:
                self.fields = tuple(name for name in record if names_a_person(name))
                self.values = {name: set() for name in record if names_a_person(name) or is_an_id(name)}
            self.records += 1
            for name, values in self.values.items():
                value = record.get(name)
                if isinstance(value, (str, bytes, int)) and len(values) < _MOST_VALUES:
                    values.add(hash(value))
            yield record

    def repeated(self) -> dict[str, int]:
        """The number of values by field, of fields with fewer values than records."""
        return {name: len(values) for name, values in self.values.items() if 0 < len(values) < self.records}
