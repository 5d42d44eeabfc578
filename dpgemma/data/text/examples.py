"""Tokens of records for fine-tuning: prompt and response, conversation, or text."""

from typing import Any

import numpy as np

from dpgemma.data.text import chat, shapes
from dpgemma.data.text.shapes import Conversation
from dpgemma.data.text.tokenizer import Tokenizer


def encoded(record: dict[str, Any], tokenizer: Tokenizer, text_field: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] of a record, closed by eos or by its last turn, and which of them are scored.

    Of a prompt and a response, the response and the eos that closes it are scored; of a conversation the model's turns;
    of a text all of it.

    Raises:
      InputError: a record without the fields, or without anything to learn.
    """
    found = shapes.of(record, has_turns=chat.has_turns(tokenizer))
    if isinstance(found, Conversation):
        return chat.turns(tokenizer, found.messages, found.learned_from)
    if found is None:
        prompt, response = np.zeros(0, np.int32), tokenizer.encode(shapes.text(record, text_field))
    else:
        prompt, response = tokenizer.encode(found.prompt), tokenizer.encode(found.response)
    ids = np.concatenate([prompt, response, [tokenizer.eos]]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)
