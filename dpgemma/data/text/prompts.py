"""Public prompts: lists of them in files, and which units answer them.

A list is a text file with one on each line, or JSON lines with prompt and perhaps weight.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from accounting.errors import InputError
from dpgemma.data.source import UnitSource
from dpgemma.data.text import chat
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import Tokenizer, utf8

MOST_PROMPTS = 10_000  # of a histogram
# The noise of a histogram is bound to this number: raise it whenever other units are counted than before.
COUNTING = 1
_UNITS_AT_ONCE = 4096


def read(path: pathlib.Path, flag: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """The prompts of a file, and their weights; None where no weight is given.

    Args:
      flag: that named the file, for messages.

    Raises:
      InputError: no such file, none in it, one twice, or a line that is no prompt.
    """
    where = f"`{flag}`={path}"
    if not path.is_file():
        raise InputError(f"{where} is no file: give a list of prompts")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{where} is no text in UTF-8: save it as that") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror})") from None
    if not lines:
        raise InputError(f"{where} is empty: give a prompt on each line")
    if path.suffix != ".jsonl":
        texts, weights = lines, None
    else:
        texts, weights = _records(lines, where)
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: prompt {number} has half a character, which no text in UTF-8 holds") from None
    if len(set(texts)) < len(texts):
        twice = next(number for number, text in enumerate(texts, 1) if text in texts[: number - 1])
        raise InputError(f"{where}: prompt {twice} stands there twice; give each once")
    return tuple(texts), weights


def _records(lines: list[str], where: str) -> tuple[list[str], tuple[float, ...] | None]:
    texts, weights, has_weights = [], [], False
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            text, weight = record["prompt"], float(record.get("weight", 1))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise InputError(f"{where}, line {number}: give a JSON object with prompt and perhaps weight") from None
        if others := sorted(set(record) - {"prompt", "weight"}):
            raise InputError(
                f"{where}, line {number} has other fields ({', '.join(map(str, others))[:80]}): a public list has"
                " prompt and weight alone, and is never taken from private records"
            )
        if not isinstance(text, str) or not 0 <= weight < float("inf"):
            raise InputError(f"{where}, line {number}: prompt must be a text, and weight a number from 0 on")
        has_weights |= "weight" in record
        texts.append(text)
        weights.append(weight)
    if not 0 < sum(weights) < float("inf"):
        raise InputError(f"{where}: the weights must add up to a number above 0")
    return texts, tuple(weights) if has_weights else None


def beginnings(prompts: Sequence[str], tokenizer: Tokenizer, length: int) -> dict[bytes, int]:
    """The tokens before the answer in a row, for each prompt: as it stands, and in a user's turn where there are turns.

    Args:
      length: of a row.

    Returns:
      The prompt's number by the bytes of int32 tokens.

    Raises:
      InputError: more prompts than can be counted, two that no row tells apart, or one that leaves no room for an
        answer.
    """
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"`prompt_histogram` has {len(prompts)} prompts: give at most {MOST_PROMPTS}")
    found: dict[bytes, int] = {}
    for number, prompt in enumerate(prompts):
        ways = [tokenizer.encode(utf8(prompt))]
        ways += [chat.prompt(tokenizer, prompt)] if chat.has_turns(tokenizer) else []
        if min(map(len, ways)) >= length:
            raise InputError(
                f"`prompt_histogram`: prompt {number + 1} fills the {length} tokens of a row, so that no unit could"
                " answer it: shorten it, or raise `sequence_length`"
            )
        for ids in ways:
            if found.setdefault(np.asarray(ids, np.int32).tobytes(), number) != number:
                raise InputError(f"`prompt_histogram`: prompt {number + 1} has the tokens of one before it: drop one")
    return found


def counted(
    source: UnitSource,
    numbers: Mapping[bytes, int],
    labels: int,
    unit: int,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """int64 [labels]: what all units contribute to each prompt.

    A unit with rows that begin with one of the prompts, and go on with what is learned, contributes `unit` in all, in
    equal shares for each of these rows; another one contributes nothing.

    Formal guarantee: whatever the rows of a unit hold, it adds at least 0 to every count and at most `unit` to all of
    them together. Tested by tests/training/histogram_test.py::test_a_unit_moves_the_counts_by_at_most_one.

    Args:
      source: the training units.
      numbers: of prompts, by `beginnings`.
      unit: what a unit contributes in all, at most.
      advance: told how many units were counted.
    """
    total = np.zeros(labels, np.int64)
    for first in range(0, source.num_units, _UNITS_AT_ONCE):
        units = np.arange(first, min(first + _UNITS_AT_ONCE, source.num_units))
        rows, owner = source.read(units)
        label = _answered(rows[TOKENS], rows[SCORED], numbers)
        answers = label >= 0
        shares = unit // np.maximum(np.bincount(owner[answers], minlength=len(units)), 1)
        np.add.at(total, label[answers], shares[owner[answers]])
        advance(len(units))
    return total


def _answered(tokens: np.ndarray, scored: np.ndarray, numbers: Mapping[bytes, int]) -> np.ndarray:
    """int64 [R]: the number of the prompt that each row answers, or -1.

    Args:
      tokens, scored: [R, S].
    """
    begins = np.where(scored.any(axis=1), scored.argmax(axis=1), -1)
    return np.array(
        [
            numbers.get(row[:begin].astype(np.int32).tobytes(), -1) if begin >= 0 else -1
            for row, begin in zip(tokens, begins, strict=True)
        ],
        np.int64,
    )
