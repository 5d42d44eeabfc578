"""What was really executed: an append-only, hash-chained file of public facts.

One JSON object per line. Every line carries the SHA-256 of the line before it and its own content, so that an edited, removed,
repeated or reordered line breaks the chain. The chain has no key: it finds accidents and partial edits, not someone who rewrites
the whole file; for that, deposit the head hash elsewhere. No line holds a wall-clock time or anything that depends on private data.

A step is written before it is executed, and at most once: a resumed run executes it again with the same batch and the same noise,
which releases nothing new.
"""

import hashlib
import json
import os
import pathlib

from accounting.errors import InputError

GENESIS = "0" * 64


def _canonical(record: dict) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(previous: str, record: dict) -> str:
    return hashlib.sha256((previous + _canonical(record)).encode()).hexdigest()


def _text(path: pathlib.Path) -> str:
    """The file as text; bytes that no ledger holds become characters that break the chain."""
    return path.read_bytes().decode("ascii", errors="replace")


def read(path: pathlib.Path) -> list[dict]:
    """The records of a ledger file, their chain verified.

    Raises:
      InputError: the first line that is not what was written, by number.
    """
    return [record for record, _ in _verified(_text(path), path)]


def _verified(text: str, path) -> list[tuple[dict, str]]:
    previous, result = GENESIS, []
    lines = text.split("\n")
    if lines.pop() != "":
        raise InputError(f"{path}: the last line is cut off; the file was truncated or edited")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            sealed = record.pop("hash")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{path}: line {number} is not a ledger record; the file was edited or damaged") from None
        sound = record.get("n") == number - 1 and sealed == _seal(previous, record)
        if not sound or line != _canonical({**record, "hash": sealed}):
            raise InputError(f"{path}: line {number} does not continue the hash chain; the file was edited or damaged")
        result.append((record, line))
        previous = sealed
    return result


class Ledger:
    """Appends to one ledger file and knows which steps it holds."""

    def __init__(self, path: pathlib.Path, lines: list[tuple[dict, str]]):
        self.path = path
        self.records = [record for record, _ in lines]
        self._lines = [line for _, line in lines]
        self._steps = {record["step"]: record for record in self.records if record["kind"] == "step"}
        self._head = json.loads(self._lines[-1])["hash"] if lines else GENESIS
        self._file = open(path, "a")

    @classmethod
    def open(cls, path: pathlib.Path) -> "Ledger":
        """Opens or creates; a last line that a crash cut off is dropped, because its step was never executed.

        Raises:
          InputError: the chain does not hold.
        """
        text = _text(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = _verified(whole, path)
        if whole != text:
            with open(path, "r+") as file:
                file.truncate(len(whole.encode()))
        return cls(path, lines)

    @property
    def head(self) -> str:
        """Hash of the last line; deposit it elsewhere to fix the ledger's content."""
        return self._head

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self._lines)

    @property
    def steps(self) -> int:
        """Number of steps recorded, 0 .. steps - 1."""
        return len(self._steps)

    @property
    def finished(self) -> bool:
        return any(record["kind"] == "finish" for record in self.records)

    def append(self, kind: str, **facts) -> None:
        record = {"n": len(self.records), "kind": kind, **facts}
        self._head = _seal(self._head, record)
        line = _canonical({**record, "hash": self._head})
        self._file.write(line + "\n")
        self._file.flush()
        self.records.append(record)
        self._lines.append(line)

    def append_step(self, step: int, group: dict) -> None:
        """Records step `step` unless it is recorded already.

        Raises:
          InputError: the step is not the next one, or was recorded with another sampling, noise or cap.
        """
        if step == self.steps:
            self.append("step", step=step, **group)
            self._steps[step] = self.records[-1]
            return
        known = self._steps.get(step)
        if known is None or any(known[name] != value for name, value in group.items()):
            raise InputError(f"{self.path}: step {step} does not follow what the ledger records; this is another run's ledger")

    def sync(self) -> None:
        """Returns when the file is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
