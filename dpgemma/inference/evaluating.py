"""How well a model predicts records that it was, or was not, trained on."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from accounting.errors import InputError
from dpgemma.data.source import Subset
from dpgemma.gemma.start import StartingPoint
from dpgemma.inference.models import Model
from dpgemma.objectives.causal import BITS_PER_BYTE, NATS_PER_TOKEN, TOKEN_ACCURACY, CausalLM
from dpgemma.training import data
from dpgemma.training.evaluation import Measured, measure

LONGEST_ROW = 1024

# Given what is done and how much there is, a context that yields what is told how much more is done.
Phase = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def silent(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A phase that nobody is told of."""
    yield lambda done: None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of a model on records; private, if the records are.

    Attributes:
      records: that were measured.
      rows: of them.
      bits_per_byte: of the text that is learned: all of a text, or responses.
      interval: of bits_per_byte, 95 %, by resampling records (or rows, where there are fewer than ten records).
      resamples_rows: whether rows were resampled.
      perplexity: for each token, exp(mean negative log-likelihood).
      token_accuracy: how often the model holds the next token for the likeliest.
      of_records: "record", the number of one in the data from 0, and its figures, for each.
    """

    records: int
    rows: int
    bits_per_byte: float
    interval: tuple[float, float]
    resamples_rows: bool
    perplexity: float
    token_accuracy: float
    of_records: list[dict[str, float]]


def evaluate(
    model: Model,
    path: str,
    *,
    sequence_length: int,
    text_field: str = "text",
    dtype: str = "float32",
    limit: int | None = None,
    skip_bad_records: bool = False,
    phase: Phase = silent,
) -> Evaluation:
    """Measures a model on records, each by itself, in rows of `sequence_length` that begin after bos.

    >>> from dpgemma.inference.models import load_directory
    >>> evaluate(load_directory("/nowhere"), "notes.jsonl", sequence_length=128)
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: /nowhere is no Hugging Face directory: it has no config.json

    Args:
      path: of records, as `data` names them.
      limit: the most records; of more, so many are drawn at random by a fixed seed.

    Raises:
      InputError: data that cannot be read as records, or rows that the model cannot take.
    """
    tokenizer = model.require_tokenizer()
    if not 1 <= sequence_length <= model.config.max_length:
        raise InputError(f"`sequence_length` must be between 1 and the model's {model.config.max_length}")
    with phase(f"reading {path}", None):
        found = data.records_of(path, tokenizer, sequence_length, model.config.vocab_size, text_field, skip_bad_records)
    count, source = found.units.num_units, found.units
    numbers = np.arange(count)
    if limit is not None and limit < count:
        numbers = np.sort(np.random.default_rng(0).choice(count, limit, replace=False))
        source = Subset(source, numbers)
    objective = CausalLM(StartingPoint("", model.config), tokenizer, sequence_length, dtype)
    parameters = jax.device_put(model.parameters)
    with phase("measuring", len(numbers)) as advance:
        measured = measure(objective, parameters, {}, source, advance=advance)
    return _summary(measured, numbers)


def _summary(measured: Measured, numbers: np.ndarray) -> Evaluation:
    figures = measured.figures()
    of_records: list[dict[str, Any]] = [
        {"record": int(number), **figures} for number, figures in zip(numbers, measured.of_units(), strict=True)
    ]
    return Evaluation(
        len(numbers),
        len(measured.owner),
        figures[BITS_PER_BYTE],
        measured.interval(BITS_PER_BYTE),
        measured.resamples_rows,
        math.exp(figures[NATS_PER_TOKEN]),
        figures[TOKEN_ACCURACY],
        of_records,
    )
