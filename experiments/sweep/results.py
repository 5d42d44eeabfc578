"""The results table: one row for each point of each run's loss curve.

The first five columns are those of the table that arXiv 2501.18914 was computed from; any table that has them can be
fitted, planned with and drawn. The others are this package's and may be missing.
"""

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from accounting.errors import InputError

MODEL, LEARNING_RATE, ITERATIONS, RATIO, LOSS = (
    "Model",
    "Learning Rate",
    "Iterations",
    "Noise Batch Ratio",
    "Cross Entropy",
)
PUBLISHED = (MODEL, LEARNING_RATE, ITERATIONS, RATIO, LOSS)
PARAMETERS, BATCH, LENGTH, TOKENS, FLOPS, SEED, EVAL_LOSS, HELD_OUT, CONFIG = (
    "Parameters", "Batch Size", "Sequence Length", "Tokens", "FLOPs", "Seed", "Eval Loss", "Held Out", "Config",
)  # fmt: skip
SCHEDULE, TOKENIZER, DATA = "Schedule", "Tokenizer", "Data"
WINDOW = "Window"  # steps before a point whose mean loss it is
OWN = (PARAMETERS, BATCH, LENGTH, TOKENS, FLOPS, SEED, WINDOW, SCHEDULE, TOKENIZER, DATA, EVAL_LOSS, HELD_OUT, CONFIG)
COLUMNS = PUBLISHED + OWN

# Sizes of the models of arXiv 2501.18914, table 1, whose table names them without their size.
BERT_PARAMETERS = {
    "BertTiny": 4.5e6, "BertMini": 11.4e6, "BertSmall": 29e6, "BertMedium": 41e6, "BertBase": 109e6, "BertLarge": 335e6,
    "BertMega": 778e6,
}  # fmt: skip
_BERT_LENGTH = 512
_TEXT = (MODEL, SCHEDULE, TOKENIZER, DATA, CONFIG)


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns by name, all of the same length; MODEL, SCHEDULE, TOKENIZER, DATA and CONFIG are text, the others float64
    (NaN where a cell is empty).
    """

    columns: dict[str, np.ndarray]

    def __post_init__(self):
        missing = [name for name in (*PUBLISHED, PARAMETERS) if name not in self.columns]
        if missing:
            raise InputError(f"a results table needs the column {missing[0]!r}")

    def __len__(self) -> int:
        return len(self.columns[MODEL])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def rows(self, keep: np.ndarray) -> "Table":
        """Those rows that a mask or a list of numbers picks."""
        return Table({name: column[keep] for name, column in self.columns.items()})

    @property
    def held_out(self) -> np.ndarray:
        """Mask of the rows that are there to test a law."""
        return self.columns[HELD_OUT] == 1 if HELD_OUT in self.columns else np.zeros(len(self), bool)

    @property
    def sequence_length(self) -> int:
        """Tokens per row.

        Raises:
          InputError: the runs differ in it, so that one law does not hold for all.
        """
        lengths = np.unique(self.columns[LENGTH]) if LENGTH in self.columns else np.array([_BERT_LENGTH])
        if len(lengths) != 1:
            raise InputError(
                f"the table mixes rows of {', '.join(f'{x:g}' for x in lengths)} tokens: fit each length by itself"
            )
        return int(lengths[0])

    @property
    def sizes(self) -> dict[str, float]:
        """Parameters of each model, by name, from small to large."""
        found = dict(zip(self.columns[MODEL].tolist(), self.columns[PARAMETERS].tolist(), strict=True))
        return dict(sorted(found.items(), key=lambda item: item[1]))


def of_records(records: Iterable[dict]) -> Table:
    """A table of rows {column: value}; a missing cell is NaN."""
    records = list(records)
    names = [name for name in COLUMNS if any(name in record for record in records)]
    columns = {}
    for name in names:
        cells = [record.get(name, "" if name in _TEXT else math.nan) for record in records]
        columns[name] = np.array([str(cell) for cell in cells]) if name in _TEXT else np.array(cells, np.float64)
    return Table(columns)


def read(path: pathlib.Path) -> Table:
    """A CSV or Parquet file.

    Raises:
      InputError: no such file, columns that are missing, or cells that are no numbers.
    """
    try:
        records = _parquet_records(path) if path.suffix == ".parquet" else _csv_records(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the results table of a sweep (.csv or .parquet)") from None
    if not records:
        raise InputError(f"{path} holds no results: run dpgemma sweep first")
    missing = [name for name in PUBLISHED if name not in records[0]]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: a results table has {', '.join(PUBLISHED)}")
    if any(not record[MODEL] for record in records):
        raise InputError(f"{path} has a row that names no model: every row of a results table is of one")
    if PARAMETERS not in records[0]:
        unknown = sorted({record[MODEL] for record in records} - set(BERT_PARAMETERS))
        if unknown:
            raise InputError(f"{path} does not say how large {unknown[0]} is: add a column {PARAMETERS!r}")
        records = [record | {PARAMETERS: BERT_PARAMETERS[record[MODEL]]} for record in records]
    try:
        return of_records({name: _cell(name, record[name]) for name in COLUMNS if name in record} for record in records)
    except ValueError as error:
        raise InputError(f"{path} holds a cell that is no number: {error}") from None


def _cell(name: str, value):
    if name in _TEXT:
        return value or ""
    return math.nan if value in ("", None) else float(value)


def _csv_records(path: pathlib.Path) -> list[dict]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file: {error}") from None


def _parquet_records(path: pathlib.Path) -> list[dict]:
    from pyarrow import lib, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except lib.ArrowInvalid as error:
        raise InputError(f"{path} is no Parquet file: {error}") from None


def write(path: pathlib.Path, table: Table) -> None:
    """Writes .csv or .parquet, in one step: a reader sees the old table or the new one. Equal tables give equal files.

    Raises:
      InputError: another kind of file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    names = [name for name in COLUMNS if name in table.columns]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: table[name] for name in names}), temporary)
    elif path.suffix == ".csv":
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(zip(*([_text(cell) for cell in table[name].tolist()] for name in names), strict=True))
    else:
        raise InputError(f"a results table is a .csv or a .parquet file, got {path.name}")
    temporary.replace(path)


def _text(cell) -> str:
    if isinstance(cell, str):
        return cell
    return "" if math.isnan(cell) else f"{cell:.10g}"
