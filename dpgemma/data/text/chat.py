"""Conversations as token ids, in Gemma's turn markup.

<start_of_turn>user\\n...<end_of_turn>\\n<start_of_turn>model\\n...<end_of_turn>\\n; what a system message says stands
before the first user turn's text, as in the chat template of the published models.
"""

from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.data.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer, utf8

MODEL = "model"
_ROLES = {"user": "user", "assistant": MODEL, MODEL: MODEL}
_SYSTEM = "system"


def turns(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] of a conversation without bos, and which of them the model would have written: each answer with its
    end-of-turn token.

    Args:
      messages: each has a `role` (system first, user, assistant or model) and a `content`.

    Raises:
      InputError: another role, content that is no text, or a tokenizer without the markup's tokens.
    """
    start, end = _markup(tokenizer)
    newline = tokenizer.encode(b"\n")
    ids, scored = [], []

    def add(tokens: Any, is_answer: bool) -> None:
        ids.append(np.atleast_1d(np.asarray(tokens, np.int32)))
        scored.append(np.full(len(ids[-1]), is_answer))

    for role, content in _with_system(messages):
        is_answer = role == MODEL
        add(start, False)
        add(tokenizer.encode(f"{role}\n".encode()), False)
        add(tokenizer.encode(utf8(content.strip())), is_answer)
        add(end, is_answer)
        add(newline, False)
    return np.concatenate(ids), np.concatenate(scored)


def prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of one user turn and the head of the model's answer, without bos."""
    start, _ = _markup(tokenizer)
    asked, _ = turns(tokenizer, [{"role": "user", "content": text}])
    return np.concatenate([asked, [start], tokenizer.encode(f"{MODEL}\n".encode())]).astype(np.int32)


def _markup(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = tokenizer.token_id(START_OF_TURN), tokenizer.token_id(END_OF_TURN)
    if start is None or end is None:
        raise InputError(f"the tokenizer has no {START_OF_TURN} and {END_OF_TURN}: chat needs a Gemma tokenizer")
    return start, end


def _text_of(content: Any) -> str:
    """What a message says: text, or a list of parts that all are text.

    Raises:
      InputError: anything else, such as a picture.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InputError("every message needs a content that is text, or a list of parts of type text")
        texts.append(text)
    return "".join(texts)


def _with_system(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(role, content) pairs, with the system message's content before that of the first turn."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise InputError("messages must be a list of objects with role and content")
    messages = [message | {"content": _text_of(message.get("content"))} for message in messages]
    system = ""
    if messages[0].get("role") == _SYSTEM:
        system, messages = messages[0]["content"].strip() + "\n\n", messages[1:]
    # What stands there instead may be private: it is not quoted.
    if not messages or any(m.get("role") not in list(_ROLES) for m in messages):
        raise InputError("messages need the roles user and assistant (system first), and no others")
    pairs = [(_ROLES[m["role"]], m["content"]) for m in messages]
    if system and pairs[0][0] == MODEL:
        raise InputError("a user's message must follow the system's: its text stands before that one's")
    return [(pairs[0][0], system + pairs[0][1].strip()), *pairs[1:]]
