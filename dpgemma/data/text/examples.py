"""Tokens of records for fine-tuning: prompt and response, messages, or text."""

from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.data.text import chat
from dpgemma.data.text.tokenizer import Tokenizer, utf8

PROMPT, RESPONSE, MESSAGES = "prompt", "response", "messages"


def is_example(record: dict[str, Any]) -> bool:
    """Whether a record is meant for fine-tuning, by its fields."""
    return PROMPT in record or MESSAGES in record


def encoded(record: dict[str, Any], tokenizer: Tokenizer, text_field: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] of a record, closed by eos or by its last turn, and which of them are scored.

    A record with `prompt` and `response` is scored on the response and the eos that closes it, one with `messages` on
    the model's turns, one with text on all of it.

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
