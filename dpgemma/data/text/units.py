"""From `data` and `privacy_unit` to privacy units of text."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.choices import AUTO, EXAMPLE, OF_SEVERAL_ROWS, SEQUENCE, USER
from dpgemma.data import readers
from dpgemma.data.formats import LeftOut, refuse
from dpgemma.data.limits import ONE_ROW, Kept, Limits, RowStore
from dpgemma.data.random_rows import RandomRows
from dpgemma.data.source import InMemory, UnitSource
from dpgemma.data.text import cache, shapes
from dpgemma.data.text.layout import Layout
from dpgemma.data.text.people import People
from dpgemma.data.text.pieces import PERCENTILES, InMemoryPieces, Reading, lengths_of_records, of_records, unsigned
from dpgemma.data.text.rows import SCORED, TOKENS, spec
from dpgemma.data.text.tokenizer import Tokenizer, check_ids
from dpgemma.data.text.users import within_limit

# So that what is made of pieces on the way to columns takes little memory beside both.
_ROWS_AT_ONCE = 1 << 12


@dataclasses.dataclass(frozen=True)
class Found:
    """The units of some data, and facts about them that are private.

    Attributes:
      privacy_unit: its name, "auto" resolved.
      units: with the rows that are kept of each.
      rows: how many are kept, of all units.
      rows_to_learn: rows, kept or not, in which something is learned.
      all_rows: rows, kept or not.
      units_cut: units that have more rows than are kept.
      bad: records that were left out because they cannot be read.
      lengths: of records, as pieces.lengths_of_records gives them; empty where there are no records.
      without_user: records that name nobody, where units are users.
      people: fields that look as if they named a person; None where units are users, or no records were read.
      users: how many there are, where `units` are records that may be those of several; else None.
    """

    privacy_unit: str
    units: UnitSource
    rows: int
    rows_to_learn: int
    all_rows: int
    units_cut: int = 0
    bad: LeftOut = dataclasses.field(default_factory=LeftOut)
    lengths: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    users: int | None = None
    without_user: int = 0
    people: People | None = None

    @property
    def remarks(self) -> list[str]:
        """What an operator should know: facts about private data, one sentence each."""
        found = []
        if self.bad.count:
            found.append(f"{self.bad.count} records cannot be read and are left out, by `skip_bad_records`")
            found += [f"left out: {what}" for what in self.bad.named]
        if self.without_user:
            found.append(f"{self.without_user} records name no user, and are units of their own")
        if self.users is not None and self.rows < self.all_rows:
            found.append(
                f"{self.all_rows - self.rows} of {self.all_rows} records are left out, because one of their users has"
                " `rows_per_unit` records already"
            )
        if self.units_cut:
            found.append(
                f"{self.units_cut} of {self.units.num_units} units have more than {self.units.max_rows} rows:"
                f" {self.all_rows - self.rows} rows are left out, by `rows_kept`"
            )
        if self.rows_to_learn < self.all_rows:
            found.append(
                f"{'some' if self.rows_to_learn else 'all'} rows have nothing to learn: their texts are empty, or"
                " prompts fill `sequence_length`"
            )
        return [*found, *self._of_records(), *self._of_people()]

    def _of_records(self) -> list[str]:
        """How many there are, and what is cut off."""
        lengths = self.lengths
        if not lengths.get("records"):  # none, or a token cache of an earlier version
            return []
        rows = f"{self.all_rows} rows of {lengths['row']}"
        found = [f"{lengths['records']} records, {self.units.num_units} units ({self.privacy_unit}), {rows}"]
        if self.privacy_unit == EXAMPLE and lengths["beyond"]:
            enough = lengths["percentiles"][PERCENTILES.index(95)]
            found.append(
                f"{lengths['longer']} records are longer than a row, and cut off:"
                f" {lengths['beyond'] / lengths['total']:.1%} of all text is left out; `sequence_length`={enough} would"
                " keep 95 % of the records whole"
            )
        return found

    def _of_people(self) -> list[str]:
        if self.people is None:
            return []
        what = "rows" if self.privacy_unit == SEQUENCE else "records"
        return [
            f"the field {name!r} has {number} values in {self.people.records} records: if it names persons, whoever has"
            f" several {what} is not protected as a person (`privacy_unit`=user `user_field`={name} does that)"
            for name, number in self.people.repeated().items()
        ]


def resolved(privacy_unit: str, data: str, text_field: str, skip_bad_records: bool = False) -> str:
    """The name of the privacy unit: "auto" takes "example" where the first record has the fields of one, otherwise
    "sequence". The choice is one of format and never depends on what the fields hold.

    Raises:
      InputError: no data.
    """
    if privacy_unit != AUTO:
        return privacy_unit
    first: dict[str, Any] = next(iter(readers.records(data, text_field, LeftOut() if skip_bad_records else refuse)), {})
    return EXAMPLE if shapes.is_example(first) else SEQUENCE


def in_memory(pieces: InMemoryPieces, tokenizer: Tokenizer, reading: Reading) -> InMemory:
    """All rows of all units that the pieces make.

    Raises:
      InputError: there is nothing to learn from.
    """
    layout = Layout(pieces, reading.privacy_unit, reading.length, tokenizer.pad)
    if len(layout.first) == 1:
        raise InputError("the data are empty: there is no text to train on")
    count = int(layout.first[-1])
    columns = {TOKENS: np.empty((count, reading.length), np.int32), SCORED: np.empty((count, reading.length), bool)}
    for begin in range(0, count, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, count)
        columns[TOKENS][begin:end], columns[SCORED][begin:end] = unsigned(layout.rows(begin, end))
    if reading.privacy_unit not in OF_SEVERAL_ROWS:
        return InMemory(columns)
    return InMemory(columns, layout.first, int(np.diff(layout.first).max()))


def read(
    data: str,
    tokenizer: Tokenizer,
    reading: Reading,
    vocab_size: int,
    limits: Limits = ONE_ROW,
    skip_bad_records: bool = False,
) -> Found:
    """The units of `data`: records, a token cache, or "random:N".

    Args:
      limits: of units that may have several rows.
      skip_bad_records: whether records that cannot be read are left out.

    Raises:
      InputError: no data, records without the fields, a cache that was made otherwise, or tokens that the model's
        embedding of `vocab_size` rows does not have.
    """
    if data.startswith(RandomRows.PREFIX):
        if reading.privacy_unit not in (AUTO, SEQUENCE):
            raise InputError(f"`data`={data} has units of one row: drop `privacy_unit`")
        rows_of_noise = RandomRows.named(data, spec(reading.length), tokenizer.vocab_size)
        count = rows_of_noise.num_units
        return Found(SEQUENCE, rows_of_noise, count, count, count)
    if reading.several_users:
        return _shared(data, tokenizer, reading, vocab_size, limits, skip_bad_records)
    if cache.is_cache(data):
        stored = cache.opened(pathlib.Path(data), tokenizer, reading)
        if stored.bad.count and not skip_bad_records:
            raise InputError(
                f"the token cache {data} was made without {stored.bad.count} records that cannot be read: give"
                " `skip_bad_records`, or make it anew"
            )
        check_ids(np.array([stored.largest_id]), vocab_size)
        unit, lengths = stored.reading.privacy_unit, stored.facts["lengths"]
        without = stored.facts["without_user"]
        return _kept(unit, stored, stored.num_rows, stored.rows_to_learn, limits, stored.bad, lengths, without)
    unit = resolved(reading.privacy_unit, data, reading.text_field, skip_bad_records)
    reading = dataclasses.replace(reading, privacy_unit=unit)
    bad = LeftOut()
    on_bad = bad if skip_bad_records else refuse
    people = None if unit == USER else People()
    records: Iterable[dict[str, Any]] = readers.records(data, reading.text_field, on_bad)
    records = records if people is None else people.seen(records)
    pieces = InMemoryPieces([piece.narrowed() for piece in of_records(records, tokenizer, reading, on_bad)])
    held = in_memory(pieces, tokenizer, reading)
    check_ids(held.columns[TOKENS], vocab_size)
    rows, to_learn = len(held.columns[TOKENS]), int(held.columns[SCORED].any(axis=1).sum())
    lengths = lengths_of_records(pieces.lengths, reading.length)
    without = sum(not piece.users for piece in pieces.held)
    return _kept(unit, held, rows, to_learn, limits, bad, lengths, without, people)


def _shared(
    data: str, tokenizer: Tokenizer, reading: Reading, vocab_size: int, limits: Limits, skip_bad_records: bool
) -> Found:
    """Records that may be those of several users, a row each."""
    if cache.is_cache(data):
        raise InputError(f"a token cache ({data}) holds records of one user each: give the records themselves")
    bad = LeftOut()
    on_bad = bad if skip_bad_records else refuse
    records = readers.records(data, reading.text_field, on_bad)
    pieces = [piece.narrowed() for piece in of_records(records, tokenizer, reading, on_bad)]
    kept = within_limit([piece.users for piece in pieces], limits.rows_per_unit)
    of_rows = dataclasses.replace(reading, privacy_unit=EXAMPLE)
    held = in_memory(InMemoryPieces([pieces[number] for number in kept]), tokenizer, of_rows)
    check_ids(held.columns[TOKENS], vocab_size)
    to_learn = int(held.columns[SCORED].any(axis=1).sum()) + len(pieces) - len(kept)
    without = sum(not piece.users for piece in pieces)
    # A record that names nobody is a unit of its own.
    users = len({name for piece in pieces for name in piece.users}) + without
    lengths = lengths_of_records(InMemoryPieces(pieces).lengths, reading.length)
    return Found(USER, held, len(kept), to_learn, len(pieces), 0, bad, lengths, users, without)


def _kept(
    unit: str,
    store: RowStore,
    rows: int,
    to_learn: int,
    limits: Limits,
    bad: LeftOut,
    lengths: Mapping[str, Any],
    without_user: int,
    people: People | None = None,
) -> Found:
    kept = Kept(store, limits if unit in OF_SEVERAL_ROWS else ONE_ROW)
    cut, left_out = kept.left_out()
    nobodys = without_user if unit == USER else 0
    return Found(unit, kept, rows - left_out, to_learn, rows, cut, bad, lengths, without_user=nobodys, people=people)
