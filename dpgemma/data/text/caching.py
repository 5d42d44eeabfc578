"""Makes a token cache: records are tokenised in parts (dpgemma.data.text.parts), then laid out in rows.

What is finished is kept, parts and shards of rows alike, so a process that is killed at any moment is continued after
the last finished one. Memory holds a few parts' records, and some numbers of every record: at most 90 bytes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from accounting.errors import InputError, as_os_errors
from dpgemma.choices import OF_SEVERAL_ROWS, SEQUENCE
from dpgemma.data import readers
from dpgemma.data.formats import File, LeftOut
from dpgemma.data.text import cache, pieces
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.cache import FACTS, FIRST, TokenCache, shard_name
from dpgemma.data.text.layout import Layout
from dpgemma.data.text.parts import USUAL, FilePieces, Progress, Sizes, tokenise, write_whole
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import Tokenizer

_PARTS, _KEY, _LOCK = "parts", "key.json", "lock"
_HASHED_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
      cache: whole.
      records: that were read.
      bad: records that were left out because they cannot be read.
    """

    cache: TokenCache
    records: int
    bad: LeftOut


def make(
    folder: pathlib.Path,
    data: str,
    tokenizer_name: str,
    reading: Reading,
    processes: int,
    progress: Progress,
    skip_bad_records: bool = False,
    sizes: Sizes = USUAL,
) -> Made:
    """Makes the cache, or goes on making it. A finished cache with equal data and settings is left unchanged.

    Args:
      tokenizer_name: as tokenizer.load takes it.
      reading: the privacy unit resolved.
      processes: that tokenise; one is this process.

    Raises:
      InputError: data that cannot be read, a folder that holds something else, or another process that writes there.
    """
    folder = folder.expanduser()
    tokenizer = tokenizer_lib.load(tokenizer_name)
    parts = folder / _PARTS
    _check_place(folder, data)
    parts.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    with _alone(folder):
        key = {
            "format": cache.FORMAT,
            "data": _digest_of_files(readers.files(data), progress),
            "tokenizer": tokenizer_lib.digest(tokenizer),
            "reading": dataclasses.asdict(reading),
            "sizes": dataclasses.asdict(sizes),
        }
        if (folder / FACTS).is_file():
            whole = TokenCache(folder, json.loads((folder / FACTS).read_text()))
            if whole.bad.count and not skip_bad_records:
                raise InputError(
                    f"{folder} holds a token cache without {whole.bad.count} records that cannot be read: give"
                    " `skip_bad_records`, or another folder"
                )
            if whole.facts["key"] != key:
                raise InputError(f"{folder} holds a token cache of other data or settings: give another folder")
            shutil.rmtree(parts, ignore_errors=True)
            return Made(whole, whole.facts["records"], whole.bad)
        _claim(parts / _KEY, key, folder)
        records, bad = tokenise(parts, data, tokenizer_name, reading, processes, progress, skip_bad_records, sizes)
        found = FilePieces(parts)
        if not len(found.lengths) or (reading.privacy_unit == SEQUENCE and not found.lengths.any()):
            raise InputError("the data are empty: there is no text to train on")
        facts = {
            **_write_rows(folder, found, reading, tokenizer, progress, sizes),
            "rows_per_shard": sizes.rows_per_shard,
            "format": cache.FORMAT,
            "key": key,
            "reading": dataclasses.asdict(reading),
            "tokenizer": key["tokenizer"],
            "tokenizer_name": tokenizer_name,
            "data": data,
            "records": records,
            "skipped": bad.count,
            "left_out": bad.named,
            "largest_id": found.largest_id,
            "without_user": found.without_user,
            "lengths": pieces.lengths_of_records(found.lengths, reading.length),
        }
        write_whole(folder / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
        shutil.rmtree(parts)
    return Made(TokenCache(folder, facts), records, bad)


def _check_place(folder: pathlib.Path, data: str) -> None:
    """Refuses a folder that holds something else, or that lies among the data; nothing is written before."""
    if cache.is_cache(data):
        raise InputError(f"{data} is a token cache already")
    source = pathlib.Path(data).expanduser()
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{folder} lies in the folder of the data, of which it would become a part: give another")
    if folder.exists() and not (folder / FACTS).is_file() and not (folder / _PARTS / _KEY).is_file():
        if not folder.is_dir():
            raise InputError(f"{folder} is a file: give a new or empty folder for a token cache")
        if others := sorted(found.name for found in folder.iterdir() if found.name not in (_PARTS, _LOCK)):
            raise InputError(f"{folder} holds {others[0]}: give a new or empty folder for a token cache")


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process makes a token cache in {folder}: wait for it") from None
        yield


def _claim(path: pathlib.Path, key: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes down what the parts are made from, or checks that those which are there were made from it."""
    if path.is_file():
        if json.loads(path.read_text()) != key:
            raise InputError(
                f"{folder} holds an unfinished token cache of other data or settings: remove it, or give another folder"
            )
    else:
        write_whole(path, json.dumps(key).encode())


def _digest_of_files(files: Sequence[File], progress: Progress) -> str:
    """A hash of names and contents."""
    progress.phase("reading", sum(file.size for file in files), "B")
    digest = hashlib.blake2b(digest_size=32)
    for named in files:
        digest.update(repr((named.name, named.size)).encode())
        with named.open() as file:
            while content := file.read(_HASHED_AT_ONCE):
                digest.update(content)
                progress.advance(len(content))
    return digest.hexdigest()


def _write_rows(
    folder: pathlib.Path, found: FilePieces, reading: Reading, tokenizer: Tokenizer, progress: Progress, sizes: Sizes
) -> dict[str, Any]:
    """Writes the shards that are not there and the index: what cache.json says of them."""
    layout = Layout(found, reading.privacy_unit, reading.length, tokenizer.pad)
    units, rows = len(layout.first) - 1, int(layout.first[-1])
    files: dict[str, dict[str, Any]] = {}
    if reading.privacy_unit in OF_SEVERAL_ROWS:
        temporary = folder / f"{FIRST}.partial"
        with open(temporary, "wb") as file:
            np.save(file, layout.first)
        temporary.replace(folder / FIRST)
        files[FIRST] = _described(folder / FIRST)
    progress.phase("writing rows", rows, "rows")
    to_learn = 0
    for number, begin in enumerate(range(0, rows, sizes.rows_per_shard)):
        end, path = min(begin + sizes.rows_per_shard, rows), folder / shard_name(number)
        counted = folder / _PARTS / f"learned-{number:05d}"
        if path.is_file():
            progress.advance(end - begin)
        else:
            temporary = path.with_name(f"{path.name}.partial")
            write_whole(
                counted, str(_write_shard(temporary, layout, begin, end, progress, sizes.rows_at_once)).encode()
            )
            temporary.replace(path)
        to_learn += int(counted.read_text())
        files[path.name] = _described(path)
    found.close()
    return {"units": units, "rows": rows, "rows_to_learn": to_learn, "files": files}


def _described(path: pathlib.Path) -> dict[str, Any]:
    """What cache.json says of a file."""
    return {"bytes": path.stat().st_size}


def _write_shard(path: pathlib.Path, layout: Layout, begin: int, end: int, progress: Progress, at_once: int) -> int:
    """Writes the rows begin .. end - 1: in how many of them something is learned."""
    learned = 0
    with _records_of(path) as writer:
        for first in range(begin, end, at_once):
            last = min(first + at_once, end)
            rows = layout.rows(first, last)
            units = np.searchsorted(layout.first, np.arange(first, last), "right") - 1
            for number, (unit, row) in enumerate(zip(units, rows, strict=True), first):
                writer.write(cache.encoded(unit, number, row))
            learned += int((rows >= 0).any(axis=1).sum())
            progress.advance(last - first)
    return learned


@contextlib.contextmanager
def _records_of(path: pathlib.Path) -> Iterator[Any]:
    """A writer of an ArrayRecord file, which tells of a disk that refuses as Python does."""
    from array_record.python import array_record_module

    with as_os_errors(path, RuntimeError):
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        yield writer
        writer.close()
