"""A token cache: tokenised rows on disk, read by their numbers.

A folder with
  cache.json   what it was made from, its units and files; it is written last, so its presence says that all is there
  rows-*       ArrayRecord files, all but the last of equally many rows: a row is the number of its unit, its own
               number (int64 each) and its stored tokens (int32, see dpgemma.data.text.pieces), little-endian
  first.npy    int64 [units + 1], the first row of every unit, where units have several; it is memory-mapped

Formal guarantee: a row that is read for a unit is that unit's, or the read fails: every row carries its unit's number
and its own. Tested by tests/data/cache_test.py::test_rows_of_other_units_are_never_read. All of it is private data.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.choices import AUTO, EXAMPLE, REFUSE, SEQUENCE
from dpgemma.data.formats import LeftOut
from dpgemma.data.spec import RowSpec
from dpgemma.data.text.pieces import Reading, unsigned
from dpgemma.data.text.rows import SCORED, TOKENS, spec
from dpgemma.data.text.tokenizer import Tokenizer, digest

FACTS, FIRST = "cache.json", "first.npy"
FORMAT = 1
_OPEN_SHARDS = 256


def shard_name(number: int) -> str:
    return f"rows-{number:05d}.array_record"


def is_cache(data: str) -> bool:
    """Whether `data` names a folder that holds a token cache."""
    return (pathlib.Path(os.path.expanduser(data)) / FACTS).is_file()


def encoded(unit: int, row: int, tokens: np.ndarray) -> bytes:
    """A row as it is stored.

    Args:
      row: its number.
    """
    return np.array([unit, row], "<i8").tobytes() + np.ascontiguousarray(tokens, "<i4").tobytes()


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Rows on disk, as a store of dpgemma.data.limits.

    Attributes:
      folder: where it lies.
      facts: the content of cache.json.
    """

    folder: pathlib.Path
    facts: dict[str, Any]

    def check(self) -> None:
        """Raises KeyError, TypeError or ValueError where a fact is missing or of another kind."""
        counts = ("units", "rows", "rows_to_learn", "largest_id", "skipped", "rows_per_shard", "without_user")
        if not all(type(self.facts[name]) is int and self.facts[name] >= 0 for name in counts):
            raise ValueError("a count is no number")
        if self.facts["units"] < 1 or self.facts["rows"] < self.facts["units"] or self.facts["rows_per_shard"] < 1:
            raise ValueError("there are no rows")
        dict(self.facts["lengths"]), list(self.facts["left_out"]), str(self.facts["tokenizer"])

    @property
    def reading(self) -> Reading:
        return Reading(**self.facts["reading"])

    @property
    def spec(self) -> RowSpec:
        return spec(self.reading.length)

    @property
    def num_units(self) -> int:
        count: int = self.facts["units"]
        return count

    @property
    def num_rows(self) -> int:
        count: int = self.facts["rows"]
        return count

    @property
    def rows_to_learn(self) -> int:
        """Rows in which something is learned."""
        count: int = self.facts["rows_to_learn"]
        return count

    @property
    def bad(self) -> LeftOut:
        """Records that were left out because they cannot be read."""
        return LeftOut(self.facts["skipped"], list(self.facts["left_out"]))

    @property
    def largest_id(self) -> int:
        """The largest id of a token."""
        largest: int = self.facts["largest_id"]
        return largest

    @functools.cached_property
    def _first(self) -> np.ndarray | None:
        if self.reading.privacy_unit in (SEQUENCE, EXAMPLE):
            return None
        try:
            first: np.ndarray = np.load(self.folder / FIRST, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            raise self._damaged(FIRST) from None
        if first.shape != (self.num_units + 1,) or first[-1] != self.num_rows:
            raise self._damaged(FIRST)
        return first

    @functools.cached_property
    def _shard(self) -> Any:
        """Returns a function that opens a shard by its number and keeps the last ones open."""

        @functools.lru_cache(maxsize=_OPEN_SHARDS)
        def opened(number: int) -> Any:
            from array_record.python import array_record_module

            return array_record_module.ArrayRecordReader(
                str(self.folder / shard_name(number)), options="readahead_buffer_size:0"
            )

        return opened

    def first_rows(self, units: np.ndarray) -> np.ndarray:
        return units if self._first is None else np.asarray(self._first[units])

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Every column of some rows.

        Raises:
          InputError: files that are damaged, or hold other rows.
        """
        stored = np.zeros((len(numbers), 4 + self.reading.length), "<i4")
        order = np.argsort(numbers, kind="stable")
        size = self.facts["rows_per_shard"]
        shards = numbers[order] // size
        for part in np.split(order, np.flatnonzero(np.diff(shards)) + 1) if len(order) else []:
            shard = int(numbers[part[0]]) // size
            try:
                found = self._shard(shard).read((numbers[part] % size).tolist())
                stored[part] = np.frombuffer(b"".join(found), "<i4").reshape(len(part), -1)
            except (ValueError, IndexError, RuntimeError, OSError):
                raise self._damaged(shard_name(shard)) from None
        units, own = np.ascontiguousarray(stored[:, :4]).view("<i8").T
        first, end = self.first_rows(units % self.num_units), self.first_rows(units % self.num_units + 1)
        if not ((own == numbers) & (first <= numbers) & (numbers < end) & (units == units % self.num_units)).all():
            raise self._damaged("the numbers of rows")
        tokens, scored = unsigned(stored[:, 4:])
        return {TOKENS: tokens, SCORED: scored}

    def _damaged(self, what: str) -> InputError:
        return InputError(f"the token cache {self.folder} is damaged ({what}): make it anew")

    def fingerprint(self, key: bytes) -> str:
        """A keyed hash of all rows, of the index and of what they are; the files are read for it."""

        def of_file(name: str) -> str:
            with open(self.folder / name, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(key=key, digest_size=32)).hexdigest()

        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = list(pool.map(of_file, sorted(self.facts["files"])))
        facts = repr((dataclasses.astuple(self.reading), self.facts["tokenizer"], digests))
        return hashlib.blake2b(facts.encode(), key=key, digest_size=32).hexdigest()


def opened(folder: pathlib.Path, tokenizer: Tokenizer, reading: Reading) -> TokenCache:
    """The cache in a folder.

    Args:
      tokenizer: of the run.
      reading: as the run would read the data themselves; "auto" takes the cache's unit of one row.

    Raises:
      InputError: a cache that was made otherwise, or that is not whole.
    """
    folder = folder.expanduser()
    try:
        cache = TokenCache(folder, json.loads((folder / FACTS).read_text()))
        if cache.facts["format"] != FORMAT:
            raise InputError(f"the token cache {folder} has another format: make it anew with this version")
        made, files = cache.reading, cache.facts["files"]
        cache.check()
        sizes = {name: (folder / name).stat().st_size for name in files}
    except (KeyError, TypeError, ValueError, FileNotFoundError):
        raise InputError(f"the token cache {folder} is damaged ({FACTS}, or files it names): make it anew") from None
    if wrong := [name for name, facts in files.items() if facts["bytes"] != sizes[name]]:
        raise InputError(f"the token cache {folder} is damaged ({wrong[0]}): make it anew")
    unit = reading.privacy_unit
    if unit == AUTO and made.privacy_unit in (SEQUENCE, EXAMPLE):
        unit = made.privacy_unit
    for name, there, here in (
        ("privacy_unit", made.privacy_unit, unit),
        ("sequence_length", made.length, reading.length),
        ("text_field", made.text_field, reading.text_field),
        ("user_field", made.user_field, reading.user_field),
        ("records_without_user", made.records_without_user or REFUSE, reading.records_without_user or REFUSE),
    ):
        if there != here:
            raise InputError(
                f"the token cache {folder} was made with `{name}`={there}, not {here}: give that, or make another cache"
            )
    if cache.facts["tokenizer"] != digest(tokenizer):
        raise InputError(
            f"the token cache {folder} was made with another `tokenizer` ({cache.facts['tokenizer_name']}): give that"
            " one, or make another cache"
        )
    return cache
