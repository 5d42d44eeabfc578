"""What was really executed: an append-only, hash-chained file of public facts.

One JSON object per line. Every line carries the SHA-256 of the line before it and its own content, so that an edited,
removed, repeated or reordered line breaks the chain. The chain has no key: it finds accidents and partial edits, not
someone who rewrites the whole file; for that, deposit the head hash elsewhere, or let every line carry a seal of its
hash under a private key as well (accounting.ledger.seals). No line holds a wall-clock time, or anything that depends on
private data but for a histogram that was released under noise.

A step is written before it is executed. A resumed run executes steps again with the same batch and the same noise,
which releases nothing new; in another place it has other noise, and the step is written once more
(accounting.ledger.history).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import events
from accounting.ledger.history import History
from accounting.ledger.seals import FIELDS, Seal, Verifier, closing

GENESIS = "0" * 64
_MOST_PROBLEMS = 20


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(previous: str, record: dict[str, Any]) -> str:
    return hashlib.sha256((previous + _canonical(record)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the file: what it records, its hash in the chain, its seals by their fields, and its text."""

    record: dict[str, Any]
    hash: str
    seals: dict[str, str]
    text: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a ledger's file.

    Attributes:
      kind: truncated, unparsable, ledger_edited, ledger_line_removed, ledger_line_repeated or ledger_lines_reordered.
      line: number in the file, from 1.
      message: a sentence.
    """

    kind: str
    line: int
    message: str


def text_of(path: pathlib.Path) -> str:
    """The file as text; bytes that no ledger holds become characters that break the chain."""
    return path.read_bytes().decode("ascii", errors="replace")


def inspect(text: str) -> tuple[list[Line], list[Problem]]:
    """Every line that can be read, and everything that is wrong with the file."""
    rows = text.split("\n")
    problems = []
    if rows.pop() != "":
        problems.append(
            Problem("truncated", len(rows) + 1, "the last line is cut off; the file was truncated or edited")
        )
    lines: list[Line] = []
    for number, row in enumerate(rows, start=1):
        line = _parse(row)
        if line is None:
            problems.append(
                Problem("unparsable", number, f"line {number} is not a ledger record; the file was edited or damaged")
            )
        else:
            problem = _break(number, line, lines, rows) if len(problems) < _MOST_PROBLEMS else None
            problems += [problem] if problem else []
            lines.append(line)
    return lines, problems


def _parse(row: str) -> Line | None:
    try:
        record = json.loads(row)
        sealed, seals = record.pop("hash"), {name: record.pop(name) for name in FIELDS if name in record}
        whole = isinstance(record["n"], int) and isinstance(record["kind"], str)
        whole &= all(isinstance(text, str) and text.isascii() for text in (sealed, *seals.values()))
        _canonical(record)  # refuses numbers that are none
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return Line(record, sealed, seals, row) if whole else None


def _break(number: int, line: Line, before: list[Line], rows: list[str]) -> Problem | None:
    """What is wrong with a line that does not continue the chain; None if it does."""
    last = before[-1] if before else None
    expected = last.record["n"] + 1 if last else 0
    spelt = line.text == _canonical({**line.record, "hash": line.hash, **line.seals})
    if spelt and line.record["n"] == expected and line.hash == _seal(last.hash if last else GENESIS, line.record):
        return None

    def problem(kind: str, message: str) -> Any:
        return Problem(kind, number, f"line {number} does not continue the hash chain; {message}")

    if any(line.text == other.text for other in before):
        return problem("ledger_line_repeated", "it is a line that stands further up already")
    if line.record["n"] != expected and line.hash == _seal(_hash_of(line.record["n"] - 1, rows), line.record):
        return problem("ledger_lines_reordered", "the lines were put in another order")
    if line.record["n"] > expected:
        return problem("ledger_line_removed", f"{line.record['n'] - expected} lines before it were removed")
    return problem("ledger_edited", "the file was edited or damaged")


def _hash_of(n: int, rows: list[str]) -> str:
    """The hash of the line that numbers itself n, wherever it stands."""
    found = [line.hash for line in map(_parse, rows) if line is not None and line.record["n"] == n]
    return GENESIS if n < 0 else found[0] if found else ""


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a ledger file, their chain verified.

    Raises:
      InputError: the first line that is not what was written, by number.
    """
    return [line.record for line in _verified(text_of(path), path)]


def _verified(text: str, path: pathlib.Path) -> list[Line]:
    lines, problems = inspect(text)
    if problems:
        raise InputError(f"{path}: {problems[0].message}")
    return lines


def unsealed(lines: Sequence[Line], verifier: Verifier) -> list[int]:
    """Numbers, from 1, of the lines whose seal is missing or was not made with the verifier's key."""

    def holds(line: Line) -> bool:
        seal = line.seals.get(verifier.field)
        return isinstance(seal, str) and len(line.seals) == 1 and verifier.holds(line.hash, seal)

    return [number for number, line in enumerate(lines, 1) if not holds(line)]


class Ledger:
    """Appends to one ledger file and knows which steps it holds.

    Args:
      lines: those that the file has.
      seal: what seals every line, or None.
      copy: is given the number, from 0, and the text of every line before it is written; where it raises, it is not.

    Attributes:
      history: which steps were executed, and where.
    """

    def __init__(
        self,
        path: pathlib.Path,
        lines: list[Line],
        seal: Seal | None = None,
        copy: Callable[[int, str], None] | None = None,
    ) -> None:
        self.path = path
        self._lines = lines
        self._seal, self._copy = seal, copy
        self.history = History.of(self.records)
        self._file = open(path, "a")

    @classmethod
    def open(
        cls, path: pathlib.Path, seal: Seal | None = None, copy: Callable[[int, str], None] | None = None
    ) -> "Ledger":
        """Opens or creates; a last line that a crash cut off is dropped, because its step was never executed.

        Raises:
          InputError: the chain does not hold, or the file has no whole line.
        """
        text = text_of(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = _verified(whole, path)
        if not lines and path.exists():
            raise InputError(f"{path} has no whole line left: restore it; without it nobody knows what was spent")
        if whole != text:
            with open(path, "r+") as file:
                file.truncate(len(whole.encode()))
        return cls(path, lines, seal, copy)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [line.record for line in self._lines]

    @property
    def head(self) -> str:
        """Hash of the last line; deposit it elsewhere to fix the ledger's content."""
        return self._lines[-1].hash if self._lines else GENESIS

    @property
    def length(self) -> int:
        return len(self._lines)

    @property
    def finished(self) -> bool:
        return any(line.record["kind"] == events.FINISH for line in self._lines)

    def begins_with(self, length: int, head: str) -> bool:
        """Whether this ledger once had `length` lines and this head."""
        return 0 < length <= self.length and self._lines[length - 1].hash == head

    def append(self, kind: str, **facts: Any) -> None:
        """Writes one line.

        Raises:
          ValueError: facts that accounting.ledger.events does not know for this kind.
        """
        events.check_writable(kind, facts)
        record = {"n": self.length, "kind": kind, **facts}
        sealed = _seal(self.head, record)
        seals = {} if self._seal is None else {self._seal.field: self._seal.of(sealed)}
        text = _canonical({**record, "hash": sealed, **seals})
        if self._copy is not None:
            self._copy(self.length, text)
        self._file.write(text + "\n")
        self._file.flush()
        self._lines.append(Line(record, sealed, seals, text))
        self.history.add(record)

    def append_step(self, step: int, group: dict[str, Any]) -> None:
        """Records step `step` unless its execution is recorded already.

        Raises:
          InputError: the step is not the next one, or was recorded with another sampling, noise or cap.
        """
        known = self.history.executed(step)
        if known is None and step == self.history.updates:
            self.append(events.STEP, step=step, **group)
            return
        if known is None or any(known[name] != value for name, value in group.items()):
            raise InputError(
                f"{self.path}: step {step} does not follow what the ledger records; this is another run's ledger"
            )

    def sync(self) -> None:
        """Returns when the file is on disk, and under a seal closes it: no earlier line can be cut off from here on."""
        os.fsync(self._file.fileno())
        if self._seal is not None:
            run_files.write(self.path.with_name(run_files.SEAL), closing(self._seal, self.length, self.head))

    def close(self) -> None:
        self._file.close()
