"""Records as tokens on disk, in parts: the first phase of a token cache.

A part holds the pieces of some records that follow each other, in two files: their tokens, and numbers about them,
which are written last and moved to their place. So a process that is killed leaves whole parts, and the next one
continues after them.

Formal guarantee: two records have one owner if they name one user, and otherwise not, but for a collision of 128-bit
BLAKE2b digests. Tested by tests/data/cache_test.py::test_users_are_told_apart_by_all_bits_of_their_digests and
::test_it_holds_the_rows_that_are_made_in_memory.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from accounting.errors import InputError
from dpgemma.data import readers
from dpgemma.data.formats import LeftOut, OnBad, refuse
from dpgemma.data.text import pieces
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import Tokenizer

_LONGEST = 1 << 30  # tokens of a record, so that 32 bits number those of a part


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is divided. A cache that is gone on with needs those that it was begun with.

    Attributes:
      part_bytes, part_records: of the records of a part, whichever is reached first.
      rows_per_shard: of all files of rows but the last.
      rows_at_once: rows that are held while they are written.
    """

    part_bytes: int = 4 << 20
    part_records: int = 1 << 14
    rows_per_shard: int = 1 << 16
    rows_at_once: int = 1024


USUAL = Sizes()


class Progress(Protocol):
    """What is told how far the work is."""

    def phase(self, name: str, total: int, unit: str) -> None: ...

    def advance(self, count: int) -> None: ...


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file under another name and moves it to its place."""
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def tokenise(
    parts: pathlib.Path, data: str, tokenizer_name: str, reading: Reading, processes: int, progress: Progress,
    skip: bool, sizes: Sizes,
) -> tuple[int, LeftOut]:  # fmt: skip
    """Writes the parts that are not there: (number of records, those that were left out)."""
    progress.phase("tokenising", sum(file.size for file in readers.files(data)), "B")
    bad, count = LeftOut(), 0
    on_bad = bad if skip else refuse
    with _Workers(processes) as workers:
        for number, (records, size) in enumerate(_chunks(data, reading.text_field, on_bad, sizes)):
            if not _part(parts, number).is_file():
                workers.do(_write_part, parts, number, count + 1, records, tokenizer_name, reading, skip)
            count += len(records)
            progress.advance(size)
    total = count + bad.count
    for path in _all_parts(parts):
        part = _numbers(path)
        bad.add(int(part["skipped"]), json.loads(part["left_out"].tobytes()))
    return total, bad


class _Workers:
    """Processes that do what they are told, a few things ahead; the first failure of one ends all.

    Where there is one, this process does it.
    """

    def __init__(self, processes: int) -> None:
        self._most = 2 * processes
        self._waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)

    def do(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._pool is None:
            function(*arguments)
            return
        self._waiting.append(self._pool.submit(function, *arguments))
        while len(self._waiting) > self._most:
            self._waiting.popleft().result()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._pool is None:
            return
        try:
            for one in self._waiting if kind is None else ():
                one.result()
        finally:
            self._pool.shutdown(cancel_futures=True)  # waits, so that nothing is written any more


def _chunks(data: str, text_field: str, on_bad: OnBad, sizes: Sizes) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The records in lists that depend on nothing but the records, and about how many bytes each list had."""
    held: list[dict[str, Any]] = []
    size = 0
    for record in readers.records(data, text_field, on_bad):
        held.append(record)
        size += _size(record)
        if size >= sizes.part_bytes or len(held) == sizes.part_records:
            yield held, size
            held, size = [], 0
    if held:
        yield held, size


def _size(value: Any) -> int:
    """About how many bytes a value takes in a file."""
    if isinstance(value, dict):
        return sum(len(name) + 6 + _size(part) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return sum(1 + _size(part) for part in value)
    return len(value) if isinstance(value, (str, bytes)) else 8


def _part(parts: pathlib.Path, number: int) -> pathlib.Path:
    return parts / f"part-{number:06d}.npz"


def _all_parts(parts: pathlib.Path) -> list[pathlib.Path]:
    return sorted(parts.glob("part-*.npz"))


@functools.cache
def _loaded(name: str) -> Tokenizer:
    return tokenizer_lib.load(name)


def _write_part(
    parts: pathlib.Path, number: int, first: int, records: list[dict[str, Any]], tokenizer_name: str, reading: Reading,
    skip: bool,
) -> None:  # fmt: skip
    """In a process of the pool: tokenises the records of one part and writes them, the numbers last."""
    tokenizer, bad = _loaded(tokenizer_name), LeftOut()
    made = list(pieces.of_records(records, tokenizer, reading, bad if skip else refuse, first))
    # A record without a user gets a digest of its own number, so it shares a unit with no other record.
    users = [_digest_of_user(piece.user, first + place) for place, piece in enumerate(made)]
    for place, piece in enumerate(made):
        if len(piece.tokens) > _LONGEST:
            raise InputError(f"record {first + place} of the data has more than 2^30 tokens: divide it")
    tokens = np.concatenate([np.zeros(0, np.int32), *(piece.tokens for piece in made)])
    narrow = tokens.size == 0 or (tokens.max() < 2**15 and tokens.min() >= -(2**15))
    write_whole(_tokens(parts, number), tokens.astype("<i2" if narrow else "<i4").tobytes())
    numbers: dict[str, Any] = dict(
        lengths=np.array([len(piece.tokens) for piece in made], np.int64),
        is_text=np.array([piece.is_text for piece in made], bool),
        rows=np.array([piece.rows for piece in made], np.int64),
        users=np.frombuffer(b"".join(users), "<u8").reshape(-1, 2),
        width=np.int64(2 if narrow else 4),
        largest=np.int64(np.where(tokens < 0, -1 - tokens, tokens).max(initial=0)),
        skipped=np.int64(bad.count),
        without_user=np.int64(sum(not piece.users for piece in made)),
        left_out=np.frombuffer(json.dumps(bad.named).encode(), np.uint8),
    )
    temporary = parts / f"numbers-{number:06d}.partial"
    with open(temporary, "wb") as file:
        np.savez(file, **numbers)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_part(parts, number))


def _tokens(parts: pathlib.Path, number: int) -> pathlib.Path:
    return parts / f"part-{number:06d}.tokens"


def _digest_of_user(user: str | None, record: int) -> bytes:
    """128 bits that stand for a user, or for a record that belongs to nobody."""
    if user is None:
        return hashlib.blake2b(record.to_bytes(8, "little"), digest_size=16, person=b"of nobody").digest()
    return hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=16, person=b"of a user").digest()


def _numbers(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


class FilePieces:
    """All pieces, in the files of the parts; 13 bytes of numbers for each lie in memory, tokens are read on request."""

    def __init__(self, parts: pathlib.Path) -> None:
        self._parts, self._files = parts, dict[int, Any]()
        found: dict[str, list[np.ndarray]] = {"lengths": [], "is_text": [], "rows": [], "starts": []}
        counts, self._widths, self.largest_id, self.without_user = [], list[int](), 0, 0
        for path in _all_parts(parts):
            part = _numbers(path)
            lengths = part["lengths"]
            found["lengths"].append(lengths.astype(np.int32))
            found["is_text"].append(part["is_text"])
            found["rows"].append(part["rows"].astype(np.int32))
            # Where each piece begins in the tokens of its part.
            found["starts"].append((np.cumsum(lengths) - lengths).astype(np.uint32))
            counts.append(len(lengths))
            self._widths.append(int(part["width"]))
            self.largest_id = max(self.largest_id, int(part["largest"]))
            self.without_user += int(part["without_user"])
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # piece of every part
        self.lengths, self.is_text, self.rows, self._starts = (
            np.concatenate([np.zeros(0, kind), *found.pop(name)])
            for name, kind in (("lengths", np.int32), ("is_text", bool), ("rows", np.int32), ("starts", np.uint32))
        )

    def owners(self) -> np.ndarray:
        count = len(self.lengths)
        low, high = np.empty(count, np.uint64), np.empty(count, np.uint64)
        for number, path in enumerate(_all_parts(self._parts)):
            here = slice(self._first[number], self._first[number + 1])
            low[here], high[here] = _numbers(path)["users"].T
        # Equal users stand next to each other, the first piece of each in front.
        order = np.argsort(low, kind="stable")
        low = low[order]
        high = high[order]
        if ((low[1:] == low[:-1]) & (high[1:] != high[:-1])).any():  # two users of one lower half, which is rare
            again = np.lexsort((order, high, low))
            order, low, high = order[again], low[again], high[again]
        is_new = np.ones(count, bool)
        is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
        del low, high
        firsts = order[is_new]
        rank = np.empty(len(firsts), np.int32)
        rank[np.argsort(firsts)] = np.arange(len(firsts), dtype=np.int32)
        owners = np.empty(count, np.int32)
        owners[order] = rank[np.cumsum(is_new, dtype=np.int32) - 1]
        return owners

    def tokens(self, numbers: np.ndarray, begin: int = 0, end: int | None = None) -> np.ndarray:
        lengths = self.lengths[numbers]
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        low, high = begin, total if end is None else min(end, total)
        found = [np.zeros(0, np.int32)]
        # Pieces that follow each other in one part are read together.
        part = np.searchsorted(self._first, numbers, "right") - 1
        breaks = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(part) != 0)) + 1
        for group in np.split(np.arange(len(numbers)), breaks) if len(numbers) else []:
            first, last = group[0], group[-1]
            here = max(low - int(starts[first]), 0), min(high, int(starts[last] + lengths[last])) - int(starts[first])
            if here[1] > here[0]:
                found.append(self._read(int(part[first]), int(numbers[first]), *here))
        return np.concatenate(found)

    def _read(self, part: int, piece: int, begin: int, end: int) -> np.ndarray:
        """Tokens begin .. end - 1, counted from the beginning of a piece of a part."""
        if part not in self._files:
            if len(self._files) >= 256:
                self._files.pop(next(iter(self._files))).close()
            self._files[part] = open(_tokens(self._parts, part), "rb")
        width = self._widths[part]
        start = int(self._starts[piece]) + begin
        content = os.pread(self._files[part].fileno(), (end - begin) * width, start * width)
        return np.frombuffer(content, f"<i{width}").astype(np.int32)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
