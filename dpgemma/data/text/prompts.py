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

# Of a histogram.
MOST_PROMPTS = 10_000
_UNITS_AT_ONCE = 4096


def read(path: pathlib.Path, flag: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """The prompts of a file, and their weights; None where no weight is given.

    Args:
      flag: that named the file, for messages.

    Raises:
      InputError: no such file, none in it, one twice, or a line that is no prompt.
    """
    where = f"`{flag}`={path}"
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not lines:
        raise InputError(f"{where} is empty: give a prompt on each line")
    if path.suffix != ".jsonl":
        texts, weights = lines, None
    else:
        texts, weights = _records(lines, where)
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
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{where}, line {number}: give a JSON object with prompt and perhaps weight") from None
        if not isinstance(text, str) or not 0 <= weight < float("inf"):
            raise InputError(f"{where}, line {number}: prompt must be a text, and weight a number from 0 on")
        has_weights |= "weight" in record
        texts.append(text)
        weights.append(weight)
    if not sum(weights):
        raise InputError(f"{where} has no prompt with a weight above 0")
    return texts, tuple(weights) if has_weights else None


def beginnings(prompts: Sequence[str], tokenizer: Tokenizer) -> dict[bytes, int]:
    """The tokens before the answer in a row, for each prompt: as it stands, and in a user's turn where there are turns.

    Returns:
      The prompt's number by the bytes of int32 tokens.

    Raises:
      InputError: more prompts than can be counted, or two that no row tells apart.
    """
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"`prompt_histogram` has {len(prompts)} prompts: give at most {MOST_PROMPTS}")
    found: dict[bytes, int] = {}
    for number, prompt in enumerate(prompts):
        ways = [tokenizer.encode(utf8(prompt))]
        ways += [chat.prompt(tokenizer, prompt)] if chat.has_turns(tokenizer) else []
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

    A unit contributes an equal share for each of its rows that begins with one of the prompts, and goes on with what is
    learned.

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
        shares = unit // np.maximum(np.bincount(owner, minlength=len(units)), 1)
        tokens, scored = rows[TOKENS], rows[SCORED]
        begins = scored.argmax(axis=1)
        for row in np.flatnonzero(scored.any(axis=1)):
            label = numbers.get(tokens[row, : begins[row]].astype(np.int32).tobytes())
            if label is not None:
                total[label] += shares[owner[row]]
        advance(len(units))
    return total
