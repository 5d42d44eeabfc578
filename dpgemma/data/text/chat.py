"""Conversations as token ids, in Gemma's turn markup.

<start_of_turn>user\\n...<end_of_turn>\\n<start_of_turn>model\\n...<end_of_turn>\\n; what a system message says stands
before the first user turn's text. Ids are those of transformers' apply_chat_template with the chat template of the
published Gemma 3 models (TEMPLATE writes the same text); what that template refuses is refused.
"""

from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.data.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer, utf8

USER, MODEL = "user", "model"
_ROLES = {"user": USER, "assistant": MODEL, MODEL: MODEL}
_SYSTEM = "system"

# The markup as exports carry it, for apply_chat_template.
TEMPLATE = """\
{{ bos_token }}
{%- set head = namespace(text='') -%}
{%- if messages[0].role == 'system' -%}
    {%- set said = messages[0].content -%}
    {%- set head.text = (said if said is string else said[0].text) + '\\n\\n' -%}
{%- endif -%}
{%- for message in (messages[1:] if head.text else messages) -%}
    {%- if loop.index0 % 2 == (1 if message.role == 'user' else 0) or message.role not in ['user', 'assistant', 'model'] -%}
        {{ raise_exception('user and assistant must take turns, the user first') }}
    {%- endif -%}
    {{ '<start_of_turn>' ~ ('user' if message.role == 'user' else 'model') ~ '\\n' }}
    {%- if loop.first -%}{{ head.text }}{%- endif -%}
    {%- if message.content is string -%}
        {{ message.content | trim }}
    {%- elif message.content is iterable -%}
        {%- for part in message.content if part.type == 'text' -%}{{ part.text | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception('a message needs a content') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""  # noqa: E501


def has_turns(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the tokens of turn markup."""
    known = (tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN))
    both = tokenizer.encode((START_OF_TURN + END_OF_TURN).encode()).tolist()
    return both == list(known)


def turns(tokenizer: Tokenizer, messages: list[Any], learned_from: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] of a conversation without bos, and which of them are learned: each answer with its end-of-turn token.

    Args:
      messages: each has a `role` (system first, user, assistant or model) and a `content`.
      learned_from: number of the first message whose answers are learned.

    Raises:
      InputError: roles that do not take turns, content that is no text, no answer to learn, or a tokenizer without the
        markup's tokens.
    """
    start, end = _markup(tokenizer)
    ids, scored = [], []

    def add(tokens: Any, is_learned: bool) -> None:
        ids.append(np.atleast_1d(np.asarray(tokens, np.int32)))
        scored.append(np.full(len(ids[-1]), is_learned))

    pairs = _checked(messages)
    first = len(pairs) - (len(messages) - learned_from)  # the system's message has no turn of its own
    for number, (role, content) in enumerate(pairs):
        is_learned = role == MODEL and number >= first
        head, whole = _inside(tokenizer, f"{role}\n"), _inside(tokenizer, f"{role}\n{content}")
        divide = _common(head, whole)
        add(start, False)
        add(whole[:divide], False)
        add(whole[divide:], is_learned)
        add(end, is_learned)
        add(_inside(tokenizer, "\n"), False)
    learned = np.concatenate(scored)
    if not learned.any():
        raise InputError("its conversation has no answer of the assistant: there is nothing to learn")
    return np.concatenate(ids), learned


def _inside(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text that stands behind a token of the markup; some tokenizers put a space before the first word."""
    return tokenizer.encode(utf8(END_OF_TURN + text))[1:]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two texts begin with alike."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(np.argmax(differs)) if differs.any() else shorter


def prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of one user turn and the head of the model's answer, without bos."""
    start, end = _markup(tokenizer)
    asked, between, head = (_inside(tokenizer, part) for part in (f"{USER}\n{text.strip()}", "\n", f"{MODEL}\n"))
    return np.concatenate([[start], asked, [end], between, [start], head]).astype(np.int32)


def _markup(tokenizer: Tokenizer) -> tuple[int, int]:
    if not has_turns(tokenizer):
        raise InputError(
            f"the tokenizer has no {START_OF_TURN} and {END_OF_TURN}: conversations need the tokenizer of a Gemma model"
            " (`tokenizer`=FOLDER of one, or `init_from`)"
        )
    start, end = tokenizer.encode((START_OF_TURN + END_OF_TURN).encode()).tolist()
    return start, end


def _text_of(content: Any, *, is_system: bool) -> str:
    """What a message says: text, or a list of parts that all are text.

    Raises:
      InputError: anything else, such as a picture.
    """
    if isinstance(content, str):
        return content if is_system else content.strip()
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InputError("every message needs a content that is text, or a list of parts of type text")
        texts.append(text if is_system else text.strip())
    if is_system and len(texts) != 1:
        raise InputError("the system's message must be one text, or one part of type text")
    return "".join(texts)


def _checked(messages: Any) -> list[tuple[str, str]]:
    """(role, content) of every turn, with the system message's content before that of the first one.

    What stands in a message that is refused may be private: it is not quoted.
    """
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise InputError("messages must be a list of objects with role and content")
    if any(m.get("tool_calls") or m.get("function_call") for m in messages):
        raise InputError("a message calls a tool, for which Gemma's turn markup has no place: write it as text")
    has_system = messages[0].get("role") == _SYSTEM
    system = _text_of(messages[0].get("content"), is_system=True) + "\n\n" if has_system else ""
    pairs: list[tuple[str, str]] = []
    for message in messages[1:] if has_system else messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise InputError("messages need the roles user and assistant (system first), and no others")
        if (_ROLES[role] == USER) != (len(pairs) % 2 == 0):
            raise InputError("messages of user and assistant must take turns, the user's first")
        content = _text_of(message.get("content"), is_system=False)
        if _ROLES[role] == MODEL and not content:
            raise InputError("a message of the assistant is empty: there is nothing to learn")
        pairs.append((_ROLES[role], (system if not pairs else "") + content))
    if not pairs:
        raise InputError("messages need a turn of the user, and not the system's alone")
    return pairs
