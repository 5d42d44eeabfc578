"""A corpus of text sampled from a trained model: record after record, in batches, the same however often it is stopped.

Formal guarantee: records, filters and card are functions of the model's parameters, of public settings (or of counts
that the run released under its budget) and of a public seed, so they are post-processing of the run that trained the
model, and what its report states holds for them too (Dwork and Roth 2014, proposition 2.1). Tested by
tests/inference/synthesis_test.py::test_records_follow_from_the_model_and_public_settings_alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accounting.errors import InputError
from dpgemma.data.text import chat
from dpgemma.data.text.tokenizer import END_OF_TURN, Tokenizer, utf8
from dpgemma.gemma import generation
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.synthesis_settings import Prompts, SynthesisSettings

_PREFILLS = (1, 8, 32, 128)
# Where a filter keeps a smaller share of so many batches, nothing more is to be expected.
_TRIED_BATCHES, _LEAST_SHARE = 4, 0.02


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One sampled text.

    Attributes:
      number: which determines its prompt and its randomness.
      prompt: None for a whole text.
      text: without the prompt.
      ended: whether the model ended it.
    """

    number: int
    prompt: str | None
    text: str
    ended: bool

    def record(self) -> dict[str, str]:
        """As it is written."""
        return {"text": self.text} if self.prompt is None else {"prompt": self.prompt, "response": self.text}


@dataclasses.dataclass
class Filter:
    """Which candidates become records, and how many do not, by reason. It reads sampled texts only."""

    settings: SynthesisSettings
    seen: set[str] = dataclasses.field(default_factory=set)
    left_out: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"without an end": 0, "too short": 0, "there before": 0}
    )

    def keeps(self, candidate: Candidate) -> bool:
        text = candidate.text.strip()
        if not candidate.ended:
            reason = "without an end"
        elif len(text) < self.settings.min_characters:
            reason = "too short"
        elif text in self.seen and not self.settings.keep_duplicates:
            reason = "there before"
        else:
            self.seen.add(text)
            return True
        self.left_out[reason] += 1
        return False


class Sampler:
    """Samples candidates of a model by their numbers."""

    def __init__(
        self,
        config: GemmaConfig,
        parameters: dict[str, Any],
        tokenizer: Tokenizer,
        settings: SynthesisSettings,
        prompts: Prompts,
        *,
        packed: bool,
        across_documents: bool = True,
        context: int | None = None,
    ) -> None:
        """Takes the model.

        Args:
          packed: whether it was trained on packed text, whose rows begin anywhere in a text; others at its beginning.
          across_documents: whether it saw the texts before a text in its row.
          context: the longest row that it shall see; by default the model's own.

        Raises:
          InputError: prompts that leave no room in the model's context, or a tokenizer without turns.
        """
        self._config, self._tokenizer, self._settings, self._prompts = config, tokenizer, settings, prompts
        self._parameters = jax.device_put(parameters)
        self._packed, self._across_documents = packed, across_documents
        self._starts = [self._start(prompt) for prompt in prompts.texts or (None,)]
        longest = max(map(len, self._starts))
        context = min(context or config.max_length, config.max_length)
        if longest >= context:
            raise InputError(f"a prompt fills the model's context of {context}: shorten it")
        self._context = context
        # The latter half of a context is gone on with, where a text leaves it.
        self._size = context if packed else min(context, longest + settings.max_new_tokens)
        weights = np.ones(len(self._starts)) if prompts.weights is None else np.asarray(prompts.weights, np.float64)
        self._shares = np.cumsum(weights) / weights.sum()
        end = self._tokenizer.token_id(END_OF_TURN)
        self._stop = (self._tokenizer.eos,) if end is None else (self._tokenizer.eos, end)

    def _start(self, prompt: str | None) -> np.ndarray:
        """What a record follows."""
        tokenizer = self._tokenizer
        bos = [tokenizer.bos]
        if prompt is None:
            # In packed rows a text begins behind the end of the one before, if that is seen.
            return np.array([*bos, tokenizer.eos] if self._packed and self._across_documents else bos, np.int32)
        ids = chat.prompt(tokenizer, prompt) if self._prompts.as_chat else tokenizer.encode(utf8(prompt))
        return np.concatenate([bos, ids]).astype(np.int32)

    def prompt_of(self, number: int) -> int:
        """Which prompt a candidate answers."""
        share = np.random.default_rng([self._settings.seed, number]).random()
        return int(np.searchsorted(self._shares, share, side="right").clip(0, len(self._starts) - 1))

    def sample(self, numbers: Sequence[int]) -> list[Candidate]:
        """The candidates with these numbers, up to `batch_size` of them.

        A text of packed rows that leaves the model's context goes on with the latter half of the context alone, as rows
        of training begin in the midst of texts.
        """
        settings, context = self._settings, self._context
        which = [self.prompt_of(number) for number in numbers]
        written: list[list[int]] = [[] for _ in numbers]
        ended, going = [False] * len(numbers), list(range(len(numbers)))
        for round_ in range(-(-2 * settings.max_new_tokens // context) + 1):
            prompts = [self._continued(self._starts[which[i]], written[i]) for i in going]
            found = self._generate(prompts, [numbers[i] for i in going], round_)
            for i, prompt_ids, new in zip(going, prompts, found, strict=True):
                room = self._size - len(prompt_ids)
                ended[i] = len(new) < min(room, settings.max_new_tokens)
                written[i] += [int(token) for token in new]
            going = [i for i in going if not ended[i] and self._packed and len(written[i]) < settings.max_new_tokens]
            if not going:
                break
        texts = []
        for tokens, has_ended in zip(written, ended, strict=True):
            whole = has_ended and len(tokens) <= settings.max_new_tokens
            text = self._tokenizer.decode(np.array(tokens[: settings.max_new_tokens], np.int32))
            texts.append((text.decode("utf-8", errors="replace"), whole and _is_utf8(text)))
        return [
            Candidate(number, self._prompts.texts[prompt] if self._prompts.texts else None, text, whole)
            for number, prompt, (text, whole) in zip(numbers, which, texts, strict=True)
        ]

    def _continued(self, start: np.ndarray, written: list[int]) -> np.ndarray:
        if not written:
            return start
        kept = written[-(self._context // 2) :]
        return np.array([self._tokenizer.bos, *kept], np.int32)

    def _generate(self, prompts: list[np.ndarray], numbers: Sequence[int], round_: int) -> list[np.ndarray]:
        """One round. Few texts are filled up to a half, a quarter ... of a batch, so that few programs are compiled."""
        size = self._settings.batch_size
        while size // 2 >= len(prompts):
            size //= 2
        filled = [*prompts, *prompts[:1] * (size - len(prompts))]
        longest = max(map(len, filled))
        key = jax.random.fold_in(jax.random.key(self._settings.seed), round_)
        every = np.array([*numbers, *[0] * (len(filled) - len(prompts))], np.uint32)
        found = generation.generate(
            self._config,
            self._parameters,
            filled,
            min(self._settings.max_new_tokens, self._size),
            self._settings.sampling(),
            stop=self._stop,
            dtype=jnp.dtype(self._settings.dtype),
            prefill=next((size for size in _PREFILLS if longest <= size), _PREFILLS[-1]),
            keys=jax.vmap(jax.random.fold_in, (None, 0))(key, every),
            size=self._size,
        )
        return found[: len(prompts)]


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def records(
    sampler: Sampler, settings: SynthesisSettings, kept: Filter, first: int, count: int
) -> Iterator[tuple[int, list[Candidate]]]:
    """(number of the first candidate that was not looked at, those of the last batch that are kept), until there are
    enough records.

    Args:
      kept: the filter, which knows the records that are there.
      first: number of the first candidate.
      count: records that are there already.

    Raises:
      InputError: the filter keeps next to none.
    """
    while count < settings.num_records:
        if first >= _TRIED_BATCHES * settings.batch_size and count < _LEAST_SHARE * first:
            reasons = ", ".join(f"{number} {reason}" for reason, number in kept.left_out.items() if number)
            raise InputError(
                f"of {first} sampled texts only {count} are kept ({reasons}): raise `max_new_tokens`, lower"
                " `temperature`, or train longer"
            )
        taken = []
        for candidate in sampler.sample(range(first, first + settings.batch_size)):
            if count == settings.num_records:
                break
            first = candidate.number + 1
            if kept.keeps(candidate):
                taken.append(candidate)
                count += 1
        yield first, taken
