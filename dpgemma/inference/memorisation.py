"""How much of some data a model has memorised: of a run its training and held-out units and its canaries, of any model
any records.

The figures are facts about the data: where those are private, so are the figures. No guarantee covers them.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from scipy import stats

from accounting import run_files
from accounting.errors import InputError
from dpgemma.data import holdout
from dpgemma.data.canaries import LEAF, Canaries, Planted
from dpgemma.data.source import UnitSource
from dpgemma.data.text import passages as passages_lib
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.passages import Passage
from dpgemma.gemma.memorisation import memorised
from dpgemma.inference import models
from dpgemma.inference.models import Model, TrainedModel
from dpgemma.storage import hub
from dpgemma.training import canaries as canaries_lib
from dpgemma.training import data
from dpgemma.training.settings import Settings

TRAINING, HELD_OUT, DATA = "training units", "held-out units", "records"
PLANTED, NOT_PLANTED = "canaries", "held-out canaries"

_UNITS_AT_ONCE = 4096
_LEVEL = 0.95

Phase = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], None]]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Passages of one kind.

    Attributes:
      name: what they are.
      repeats: how often each stands in the training data; 0 for held-out ones, None where that is not known.
      passages: drawn from them.
    """

    name: str
    repeats: int | None
    passages: Sequence[Passage]


@dataclasses.dataclass(frozen=True)
class Share:
    """How many passages of a group a model has memorised.

    Attributes:
      model: by its name.
      group, repeats: as Group has them.
      passages: that were continued.
      exact, approximate: how many of them were continued so.
    """

    model: str
    group: str
    repeats: int | None
    passages: int
    exact: int
    approximate: int

    def interval(self, count: int) -> tuple[float, float]:
        """Of a share, at 95 % (Clopper and Pearson 1934)."""
        low, high = stats.binomtest(count, self.passages).proportion_ci(_LEVEL, method="exact")
        return float(low), float(high)

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {
            "exact_interval_95": list(self.interval(self.exact)),
            "approximate_interval_95": list(self.interval(self.approximate)),
        }


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
      passages: the most of each group; of more, so many are drawn by a fixed seed.
      prefix, suffix: their lengths.
    """

    passages: int = 10_000
    prefix: int = 50
    suffix: int = 50

    def __post_init__(self) -> None:
        for name in ("passages", "prefix", "suffix"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")


def check_context(model: Model, question: Question) -> None:
    """Refuses passages that have no room in a model's context, where none could be continued.

    Raises:
      InputError: it has too few places.
    """
    if 1 + question.prefix + question.suffix > model.config.max_length:
        raise InputError(
            f"`prefix`={question.prefix} and `suffix`={question.suffix} do not fit into the model's context of"
            f" {model.config.max_length}, which has a place of its own for the beginning: lower them"
        )


def check_alike(other: Model, name: str, first: Model) -> None:
    """Refuses to ask a model for the passages of another one with other ids.

    Raises:
      InputError: their tokenizers or vocabularies differ.
    """
    mine, theirs = (tokenizer_lib.digest(model.require_tokenizer()) for model in (other, first))
    texts = ("seen today, 37.5 C: rest.", "Zoë — ça va?")
    ids = [[model.require_tokenizer().encode(text.encode()).tolist() for text in texts] for model in (other, first)]
    if other.config.vocab_size != first.config.vocab_size or (mine != theirs and ids[0] != ids[1]):
        raise InputError(f"{name} has another tokenizer than the first model: ask it by itself, with `data`")


def measured(model: Model, name: str, groups: Sequence[Group], phase: Phase) -> list[Share]:
    """How many passages of every group a model has memorised.

    Args:
      name: of the model.
    """
    parameters, bos = jax.device_put(model.parameters), model.require_tokenizer().bos
    found = []
    with phase(f"asking {name}", sum(len(group.passages) for group in groups)) as advance:
        for group in groups:
            if group.passages:
                exact, near = memorised(model.config, parameters, group.passages, bos=bos, advance=advance)
                counts = len(exact), int(exact.sum()), int(near.sum())
                found.append(Share(name, group.name, group.repeats, *counts))
    return found


def of_records(model: Model, path: str, text_field: str, question: Question) -> list[Group]:
    """Groups of any records, for a model whose training data are not known.

    Raises:
      InputError: data that cannot be read, or that hold no passage of this length.
    """
    length = min(model.config.max_length - 1, 2 * (question.prefix + question.suffix))
    found = data.records_of(path, model.require_tokenizer(), length, model.config.vocab_size, text_field)
    return _checked(_of_units(DATA, found.units, None, question, model), question)


def of_run(model: TrainedModel, path: str | None, question: Question) -> list[Group]:
    """Groups of a run: its training units by how often they stand there, its held-out units, its canaries.

    Args:
      path: where the run's data lie now; by default where they lay.

    Raises:
      InputError: other data than the run's, or none that can be read; no keys.
    """
    run, config = model.run, model.run.config()
    if not run.keys_file.exists():
        raise InputError(f"{run.path} has no private/ here, which says what was trained on: ask where it is")
    settings = Settings.of_config(config | ({"data": path} if path else {}))
    keys, tokenizer = run.keys, model.require_tokenizer()
    source = data.read(settings, tokenizer, model.config.vocab_size, keys.holdout).units
    canaries = canaries_lib.kept(run.path, keys.holdout) if settings.canaries else None
    fingerprint = (source if canaries is None else Planted(source, canaries)).fingerprint(keys.fingerprint)
    if json.loads(run.data_file.read_text())["fingerprint"] != fingerprint:
        raise InputError(
            f"{settings.data} does not hold the data that {run.path} was trained on: say where with `data`"
        )
    training, held_out = holdout.split(source, keys.holdout, settings.holdout_fraction)
    groups = _of_units(TRAINING, training, training, question, model)
    groups += _of_units(HELD_OUT, held_out, None, question, model, repeats=0)
    return _checked([*groups, *_of_canaries(canaries, question)], question)


def _of_canaries(canaries: Canaries | None, question: Question) -> Iterator[Group]:
    if canaries is None or LEAF in canaries.columns:
        return
    found = passages_lib.first_passages(canaries.columns, question.prefix, question.suffix)
    for included, name in ((True, PLANTED), (False, NOT_PLANTED)):
        for repeats in np.unique(canaries.repeats):
            which = np.flatnonzero((canaries.included == included) & (canaries.repeats == repeats))
            passages = [passage for i in which if (passage := found[i]) is not None]
            yield Group(name, int(repeats) if included else 0, passages[: question.passages])


def _of_units(
    name: str,
    source: UnitSource,
    counted_in: UnitSource | None,
    question: Question,
    model: Model,
    repeats: int | None = None,
) -> list[Group]:
    """Groups of units by how often their passages stand in the data, and of what is shaped like a secret in them.

    Args:
      counted_in: where equal passages are counted; None: `repeats` is known.
    """
    rng = np.random.default_rng(0)
    count = min(source.num_units, question.passages)
    drawn = np.sort(rng.choice(source.num_units, count, replace=False)) if count else np.zeros(0, np.int64)
    passages: list[Passage] = []
    shaped: dict[str, list[Passage]] = collections.defaultdict(list)
    tokenizer = model.require_tokenizer()
    for first in range(0, len(drawn), _UNITS_AT_ONCE):
        rows, _ = source.read(drawn[first : first + _UNITS_AT_ONCE])
        passages += _there(passages_lib.first_passages(rows, question.prefix, question.suffix))
        for shape, passage in passages_lib.shaped_passages(rows, question.prefix, tokenizer):
            if len(shaped[shape]) < question.passages:
                shaped[shape].append(passage)
    passages = passages[: question.passages]
    secrets = [Group(f"{name}, {shape}", repeats, found) for shape, found in shaped.items()]
    if counted_in is None:
        return [Group(name, repeats, passages), *secrets]
    times = _counted(counted_in, passages, question)
    by_count: dict[int, list[Passage]] = collections.defaultdict(list)
    for passage in {passage.identity: passage for passage in passages}.values():
        by_count[times[passage.identity]].append(passage)
    return [*(Group(name, n, by_count[n]) for n in sorted(by_count)), *secrets]


def _there(passages: Sequence[Passage | None]) -> list[Passage]:
    return [passage for passage in passages if passage is not None]


def _counted(source: UnitSource, passages: Sequence[Passage], question: Question) -> dict[bytes, int]:
    """How many rows begin with each of the passages."""
    times = dict.fromkeys((passage.identity for passage in passages), 0)
    for first in range(0, source.num_units, _UNITS_AT_ONCE):
        rows, _ = source.read(np.arange(first, min(first + _UNITS_AT_ONCE, source.num_units)))
        for passage in _there(passages_lib.first_passages(rows, question.prefix, question.suffix)):
            if passage.identity in times:
                times[passage.identity] += 1
    return times


def _checked(groups: list[Group], question: Question) -> list[Group]:
    if not any(group.passages for group in groups):
        raise InputError(
            f"no row has a prefix of {question.prefix} and a suffix of {question.suffix} behind it: lower `prefix` and"
            " `suffix`"
        )
    return groups


def is_run(folder: str) -> bool:
    """Whether a folder is a run's, rather than a model in Hugging Face format."""
    return (pathlib.Path(folder) / run_files.LEDGER).exists()


def model_of(folder: str) -> Model:
    """A run's model, or one in Hugging Face format.

    Raises:
      InputError: neither of them.
    """
    if is_run(folder):
        return models.load(folder)
    if not (pathlib.Path(folder).is_dir() or hub.is_hub_name(folder)):
        raise InputError(f"{folder} is neither a run's folder nor a Hugging Face directory on this disk")
    return models.load_directory(folder)
