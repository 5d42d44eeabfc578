"""The file of a synthetic corpus: JSON lines that grow batch by batch, and a card that says what holds for them.

While it grows, a file beside it says how far it is. A command that was stopped or killed goes on from there; what was
written behind that place is cut off and sampled again, to the same texts.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import chain, histogram
from accounting.ledger import executed as executed_lib
from accounting.report import card
from accounting.report.content import build
from accounting.report.spending import spent
from dpgemma.gemma.synthesis import Candidate, Filter
from dpgemma.gemma.synthesis_settings import Prompts
from dpgemma.inference.models import TrainedModel


@dataclasses.dataclass
class Corpus:
    """A corpus that is being written.

    Attributes:
      path: of the JSON lines.
      identity: what decides its texts; a corpus goes on only with the same.
      candidates: texts that were sampled so far.
      records: that are written.
      bytes: of them.
      left_out: how many texts were left out, by reason.
    """

    path: pathlib.Path
    identity: dict[str, Any]
    candidates: int = 0
    records: int = 0
    bytes: int = 0
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def _state(self) -> pathlib.Path:
        return self.path.with_name(f".{self.path.name}.state")

    @property
    def card(self) -> pathlib.Path:
        """The file that says what holds for the corpus."""
        return self.path.with_suffix(".md")

    @classmethod
    def is_complete(cls, path: pathlib.Path) -> bool:
        """Whether a file is a corpus that has its card."""
        corpus = cls(path, {})
        return path.exists() and corpus.card.exists() and not corpus._state.exists()

    @classmethod
    def opened(cls, path: pathlib.Path, identity: dict[str, Any], kept: Filter) -> "Corpus":
        """A new corpus, or one that goes on.

        Args:
          kept: is told which texts are there.

        Raises:
          InputError: another file is there, or a corpus of another model or other settings.
        """
        corpus = cls(path, json.loads(json.dumps(identity)))
        if not corpus._state.exists():
            if path.exists() or corpus.card.exists():
                raise InputError(f"{path if path.exists() else corpus.card} is there already: choose another `out`")
            corpus._keep()
            return corpus
        state = json.loads(corpus._state.read_text())
        differing = [name for name in corpus.identity if state["identity"].get(name) != corpus.identity[name]]
        if differing:
            raise InputError(
                f"{path} was begun with another {', '.join(differing)}: give the same, or choose another `out`"
            )
        corpus.candidates, corpus.records, corpus.bytes = (state[n] for n in ("candidates", "records", "bytes"))
        kept.left_out.update(state["left_out"])
        corpus.left_out = dict(state["left_out"])
        if (path.stat().st_size if path.exists() else 0) < corpus.bytes:
            raise InputError(f"{path} is not as long as it was: restore it, or remove {corpus._state} to begin anew")
        if path.exists():
            os.truncate(path, corpus.bytes)
            with open(path) as lines:
                kept.seen.update(list(json.loads(line).values())[-1].strip() for line in lines)
        return corpus

    def add(self, sampled: int, records: list[Candidate], kept: Filter) -> None:
        """Appends records, and then says that they are there.

        Args:
          sampled: texts that were sampled so far.
        """
        lines = "".join(json.dumps(record.record(), ensure_ascii=False) + "\n" for record in records).encode()
        with open(self.path, "ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.candidates, self.records, self.bytes = sampled, self.records + len(records), self.bytes + len(lines)
        self.left_out = dict(kept.left_out)
        self._keep()

    def _keep(self) -> None:
        """Says how far the file is."""
        state = {name: getattr(self, name) for name in ("identity", "candidates", "records", "bytes", "left_out")}
        run_files.write(self._state, json.dumps(state))

    def finish(self, text: str) -> None:
        """Writes the card; the corpus is complete."""
        run_files.write(self.card, text)
        self._state.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any]:
        """What the card says of the file."""
        return {
            "file": self.path.name,
            "sha256": run_files.file_digest(self.path),
            "records": self.records,
            "sampled texts": self.candidates,
            **{f"left out, {reason}": number for reason, number in self.left_out.items()},
            **self.identity,
            "prompts": _told(self.identity.get("prompts") or {}),
        }


def _told(prompts: dict[str, Any]) -> str:
    """Which prompts records answer."""
    if not prompts.get("texts"):
        return "none"
    by = "the counts that the run released" if prompts["are_counted"] else "their weights"
    how = "all alike" if prompts["weights"] is None else f"by {by}"
    return f"{len(prompts['texts'])}, drawn {how}; what was left out makes some of them rarer"


def counted_prompts(model: TrainedModel, as_chat: bool) -> Prompts | None:
    """The prompts whose units the run has counted, drawn as often as it found them; None where it counted none.

    Formal guarantee: they and their weights are read from the run's ledger, where they were released under noise, and
    from nothing else. Tested by tests/training/histogram_test.py::test_a_corpus_is_drawn_by_the_released_counts.

    Raises:
      InputError: a ledger whose chain is broken, or no count above zero.
    """
    lines, problems = chain.inspect(chain.text_of(model.run.ledger_file))
    if problems:
        raise InputError(f"{model.run.ledger_file} is damaged: run dpgemma audit")
    records = [line.record for line in lines]
    found = histogram.of(records, executed_lib.of(records).planned.num_units)
    if found is None:
        return None
    weights = tuple(max(0.0, count) for count in found.counts)
    if not sum(weights):
        raise InputError("no noised count of the run's `prompt_histogram` is above zero: give `prompts`")
    return Prompts(found.labels, weights, as_chat, are_counted=True)


def card_of(model: TrainedModel, corpus: Corpus) -> str:
    """The card of a corpus that was sampled from a run's model.

    Formal guarantee: its epsilon is that of a ledger to which the model's checkpoint is bound. Tested by
    tests/inference/synthesis_test.py::test_the_card_states_the_runs_guarantee.

    Raises:
      InputError: the checkpoint belongs to another ledger.
    """
    lines, problems = chain.inspect(chain.text_of(model.run.ledger_file))
    is_bound = 0 < model.ledger_lines <= len(lines) and lines[model.ledger_lines - 1].hash == model.ledger_head
    if problems or not is_bound:
        raise InputError(f"checkpoint {model.step} does not belong to {model.run.ledger_file}: run dpgemma audit")
    done = executed_lib.of([line.record for line in lines])
    report = build(done, spent(done, done.accountant()), lines[-1].hash)
    counted = corpus.identity["prompts"]["are_counted"]
    return card.corpus_card(run_files.encode(report), model.step, corpus.facts(), drawn_by_histogram=counted)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing the same corpus.

    Raises:
      InputError: one does.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process writes {path}: wait for it, or choose another `out`") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
