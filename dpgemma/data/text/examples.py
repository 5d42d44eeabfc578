"""Records for fine-tuning into rows, the privacy units of `privacy_unit`=example.

Formal guarantee: row i is a function of record i alone, and nothing of a record is in any other row: changing one
record changes one privacy unit. Tested by
tests/data/examples_test.py::test_pitfall_19_a_record_is_one_row_and_touches_no_other.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.data.source import InMemory
from dpgemma.data.text import chat
from dpgemma.data.text.rows import units_of_one_row
from dpgemma.data.text.tokenizer import Tokenizer, utf8

PROMPT, RESPONSE, MESSAGES = "prompt", "response", "messages"


def is_example(record: dict[str, Any]) -> bool:
    """Whether a record is meant for fine-tuning, by its fields."""
    return PROMPT in record or MESSAGES in record


def to_rows(records: Iterable[dict[str, Any]], tokenizer: Tokenizer, length: int, text_field: str) -> InMemory:
    """One row per record, cut at `length` tokens and filled with pad.

    A record with `prompt` and `response` is scored on the response and the eos that closes it, one with `messages` on
    the model's turns, one with text on all of it.

    Raises:
      InputError: no records, or one without the fields; names it by its number.
    """
    tokens, scored = [], []
    for number, record in enumerate(records, start=1):
        try:
            ids, is_scored = encoded(record, tokenizer, text_field)
        except InputError as error:
            raise InputError(f"record {number} of the data: {error}") from None
        ids, is_scored = ids[:length], is_scored[:length]
        padding = (0, length - len(ids))
        tokens.append(np.pad(ids, padding, constant_values=tokenizer.pad))
        scored.append(np.pad(is_scored, padding))
    if not tokens:
        raise InputError("the data are empty: there is no record to train on")
    return units_of_one_row(np.stack(tokens), np.stack(scored))


def encoded(record: dict[str, Any], tokenizer: Tokenizer, text_field: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] of a record, closed by eos or by its last turn, and which of them are scored.

    Raises:
      InputError: a record without the fields.
    """
    if MESSAGES in record:
        return chat.turns(tokenizer, record[MESSAGES])
    if PROMPT in record:
        prompt, response = (tokenizer.encode(_text(record, field)) for field in (PROMPT, RESPONSE))
    else:
        prompt, response = np.zeros(0, np.int32), tokenizer.encode(_text(record, text_field))
    ids = np.concatenate([prompt, response, [tokenizer.eos]]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def _text(record: dict[str, Any], field: str) -> bytes:
    value = record.get(field)
    if isinstance(value, str):
        return utf8(value)
    if not isinstance(value, bytes):
        raise InputError(
            f"no text in its field {field!r}; an example has {PROMPT} and {RESPONSE}, {MESSAGES}, or `text_field`"
        )
    return value
