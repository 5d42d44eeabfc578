"""Records for fine-tuning as other tools write them, in the two shapes that this package learns from.

| fields | written for |
|---|---|
| `messages`: a list of role and content, or that list as a text of JSON | OpenAI, transformers |
| `conversations`: a list of from and value, or of role and content | ShareGPT |
| `instruction`, `output`, perhaps `input` and `system` | Alpaca |
| `instruction`, `response`, perhaps `context` | Dolly |
| `prompt`, `completion`: two texts, or two lists of messages | TRL |
| `prompt`, `response`: two texts | |
"""

import dataclasses
import json
from typing import Any

from accounting.errors import InputError
from dpgemma.data.text.tokenizer import utf8

PROMPT, RESPONSE, COMPLETION, MESSAGES = "prompt", "response", "completion", "messages"
_CONVERSATIONS = "conversations"
_INSTRUCTION, _OUTPUT, _SYSTEM = "instruction", "output", "system"
_INPUTS, _OUTPUTS = ("input", "context"), (_OUTPUT, RESPONSE)
# Of ShareGPT's `from`.
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with role and content.

    Attributes:
      messages: as they were written; data.text.chat checks them.
      learned_from: number of the first message whose answers are learned.
    """

    messages: list[Any]
    learned_from: int = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and the response that is learned."""

    prompt: bytes
    response: bytes


def is_example(record: dict[str, Any]) -> bool:
    """Whether a record is meant for fine-tuning, by its fields."""
    return PROMPT in record or MESSAGES in record or _CONVERSATIONS in record or _is_instruction(record)


def _is_instruction(record: dict[str, Any]) -> bool:
    return _INSTRUCTION in record and any(field in record for field in _OUTPUTS)


def of(record: dict[str, Any], *, has_turns: bool) -> Conversation | Pair | None:
    """What a record is made of; None where it has none of the fields.

    Args:
      has_turns: whether the tokenizer has turn markup. If not, an Alpaca record is a prompt and a response.

    Raises:
      InputError: fields without the content that belongs there.
    """
    if MESSAGES in record:
        return Conversation(_list_of(record[MESSAGES], MESSAGES))
    if _CONVERSATIONS in record:
        return Conversation([_spoken(turn) for turn in _list_of(record[_CONVERSATIONS], _CONVERSATIONS)])
    if PROMPT in record and COMPLETION in record and isinstance(record[PROMPT], list):
        asked = _list_of(record[PROMPT], PROMPT)
        return Conversation([*asked, *_list_of(record[COMPLETION], COMPLETION)], len(asked))
    if PROMPT in record:
        return _pair(text(record, PROMPT), text(record, COMPLETION if COMPLETION in record else RESPONSE))
    if _is_instruction(record):
        return _alpaca(record, has_turns=has_turns)
    return None


def _alpaca(record: dict[str, Any], *, has_turns: bool) -> Conversation | Pair:
    if record.get("history"):
        raise InputError("its field 'history' holds earlier turns: write them as messages")
    asked = [text(record, _INSTRUCTION), *(text(record, field) for field in _INPUTS if record.get(field))]
    system = [text(record, _SYSTEM)] if record.get(_SYSTEM) else []
    answer = text(record, next(field for field in _OUTPUTS if field in record))
    if not has_turns:
        return _pair(b"\n".join([*system, *asked]) + b"\n", answer)
    messages = [{"role": "system", "content": said.decode(errors="replace")} for said in system]
    messages.append({"role": "user", "content": b"\n".join(asked).decode(errors="replace")})
    return Conversation([*messages, {"role": "assistant", "content": answer.decode(errors="replace")}])


def _pair(prompt: bytes, response: bytes) -> Pair:
    if not response.strip():
        raise InputError("its response is empty: there is nothing to learn")
    return Pair(prompt, response)


def _list_of(value: Any, field: str) -> list[Any]:
    """A list of messages, or the list that a text of JSON holds."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise InputError(f"its field {field!r} is no list of messages")
    return value


def _spoken(turn: Any) -> Any:
    """A turn of ShareGPT as a message; one that has a role is left as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS or not isinstance(turn.get("value"), str):
        raise InputError("turns need a value, and a speaker in 'from' that is system, human or gpt")
    return {"role": _SPEAKERS[speaker], "content": turn["value"]}


def text(record: dict[str, Any], field: str) -> bytes:
    """The text of a field.

    Raises:
      InputError: it holds none.
    """
    value = record.get(field)
    if isinstance(value, str):
        return utf8(value)
    if not isinstance(value, bytes):
        raise InputError(
            f"no text in its field {field!r}; an example has {PROMPT} and {RESPONSE} (or {COMPLETION}), {MESSAGES},"
            f" {_CONVERSATIONS}, {_INSTRUCTION} and {_OUTPUT}, or `text_field`"
        )
    return value
