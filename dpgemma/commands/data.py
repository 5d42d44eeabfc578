"""dpgemma data: looks at data before they are trained on, or tokenises them once for many runs."""

import dataclasses
import os
import pathlib
import sys
from typing import Any

from absl import flags

from accounting.errors import InputError
from dpgemma.choices import OF_SEVERAL_ROWS, PUBLIC_OWNERS
from dpgemma.commands import command_flags
from dpgemma.storage.objects import is_address
from dpgemma.training.settings import Settings

DESCRIPTION = (
    "data stats PATH says what a run with these flags would train on; data tokenize PATH --out=FOLDER writes a token"
    " cache, which --data may name. What both print is private."
)
POSITIONAL = ("action", "data")
# Settings that a run on a cache needs as the cache was made with them.
_NEEDED = ("tokenizer", "init_from", "user_field", "records_without_user")
_ACTIONS = (STATS, TOKENIZE) = ("stats", "tokenize")


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.define_from_dataclass(Settings, fv)
    command_flags.string("action", None, f"{STATS} or {TOKENIZE}.", fv)
    command_flags.string("out", None, f"Folder of the token cache that {TOKENIZE} writes, or goes on writing.", fv)
    command_flags.count("processes", None, "Processes that tokenize; by default one for each core.", fv)
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if fv.action not in _ACTIONS:
        raise InputError(f"say what to do with the data: dpgemma data {STATS} PATH or dpgemma data {TOKENIZE} PATH")
    given: dict[str, Any] = {field.name: fv[field.name].value for field in dataclasses.fields(Settings)}
    settings = Settings(**given)
    if fv.action == STATS:
        from dpgemma.commands import data_stats

        return data_stats.run(settings, epsilon_given=bool(fv["epsilon"].present), as_json=fv.json)
    return _tokenize(settings, fv.out, fv.processes)


def _tokenize(settings: Settings, out: str | None, asked: int | None) -> int:
    if out is None:
        raise InputError("say where the token cache shall lie: give --out=FOLDER")
    processes = (os.cpu_count() or 1) if asked is None else asked
    if is_address(out):
        raise InputError(f"a token cache lies on a disk: give another folder than --out={out}, and copy it afterwards")
    if processes < 1:
        raise InputError(f"--processes must be at least 1, got {processes}")
    if settings.ownership == PUBLIC_OWNERS:
        raise InputError("a token cache holds records of one user each: drop --ownership, or train on the records")
    from dpgemma.data.text import cache, caching, units
    from dpgemma.training import data

    reading = data.reading(settings)
    if cache.is_cache(settings.data):
        raise InputError(f"{settings.data} is a token cache already")
    unit = units.resolved(reading.privacy_unit, settings.data, settings.text_field, settings.skip_bad_records)
    bar = _Bar()
    made = caching.make(
        pathlib.Path(out),
        settings.data,
        data.located_tokenizer(data.tokenizer_of(settings)),
        dataclasses.replace(reading, privacy_unit=unit),
        processes,
        bar,
        settings.skip_bad_records,
    )
    bar.close()
    whole = made.cache
    for what in made.bad.named:
        print(f"left out: {what}", file=sys.stderr)
    skipped = f", {made.bad.count} records left out" if made.bad.count else ""
    print(
        f"{whole.folder}: {made.records} records{skipped}, {whole.num_units} units, {whole.num_rows} rows of"
        f" {whole.reading.length}. It holds the text itself, and these numbers are private like it."
    )
    flags = {"data": whole.folder, "sequence_length": whole.reading.length}
    flags |= {name: value for name in _NEEDED if (value := getattr(settings, name)) is not None}
    if unit in OF_SEVERAL_ROWS:
        flags["privacy_unit"] = unit
    skip = " --skip_bad_records" if made.bad.count else ""
    print("train on it with " + " ".join(f"--{name}={value}" for name, value in flags.items()) + skip)
    return 0


class _Bar:
    """Progress on the terminal, one bar for each phase, with the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def phase(self, name: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=total, desc=name, unit=unit, unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        # A part's size is estimated from its records: the bar never runs beyond its end.
        self._bar.update(min(count, self._bar.total - self._bar.n))
