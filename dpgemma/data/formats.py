"""Files of records: of which kind one is, and its records one after the other.

A record that cannot be read is refused, or given to `on_bad` and left out; a file that cannot be read is refused in any
case.

The kind is told by what a file begins with, and where that leaves it open by its ending: .jsonl, .ndjson and .json,
.csv and .tsv; everything else that is text is one record, unless it begins as records in JSON do. Files compressed by
gzip or zstd are read as what they hold. What is no text in UTF-8, or broken, is refused with the file's name and the
line or record.
"""

import codecs
import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Protocol

from accounting.errors import InputError

_GZIP, _ZSTD, _PARQUET, _ARROW_FILE, _ARROW_STREAM = b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_BOM, _OTHER_UNICODE = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_NAMED = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"{\\rtf": "a document in rich text",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
}
_LINES, _LIST, _TABLES = (".jsonl", ".ndjson"), ".json", {".csv": ",", ".tsv": "\t"}
_COMPRESSED = (".gz", ".zst")
_ARRAY_RECORD = re.compile(r"\.(array_record|arrayrecord|arecord)(-\d+-of-\d+)?$")
_LOOKED_AT, _AT_ONCE, _CHECKED_AT_ONCE = 8192, 1024, 1 << 24


class File(Protocol):
    """A file, wherever it lies. Its `str` is what messages call it.

    Attributes:
      name: without folders.
      size: bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def open(self) -> contextlib.AbstractContextManager[io.BufferedReader]:
        """Its bytes, from the first on."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file on a disk."""

    path: pathlib.Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        with open(self.path, "rb") as file:
            yield file


OnBad = Callable[[InputError], None]


def refuse(bad: InputError) -> None:
    """Raises what is wrong with a record."""
    raise bad


MOST_NAMED = 100


@dataclasses.dataclass
class LeftOut:
    """Records that cannot be read and are left out. Called with what is wrong with one, it adds that one.

    Attributes:
      count: how many there are.
      named: what is wrong with the first MOST_NAMED of them, by file and line or by number.
    """

    count: int = 0
    named: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, bad: InputError) -> None:
        self.add(1, [str(bad)])

    def add(self, count: int, named: Iterable[str]) -> None:
        """Adds some that were left out elsewhere."""
        self.count += count
        self.named = [*self.named, *named][:MOST_NAMED]


def records(path: File, text_field: str, on_bad: OnBad = refuse) -> Iterator[dict[str, Any]]:
    """The records of a file.

    Args:
      text_field: what the only field of a text file is called.
      on_bad: told what is wrong with a record that cannot be read.

    Raises:
      InputError: names the file, and the line or record, that cannot be read.
    """
    if _ARRAY_RECORD.search(path.name):
        yield from _array_records(path, text_field, on_bad)
        return
    with _opened(path) as file:
        start = file.peek(_LOOKED_AT)[:_LOOKED_AT]
        name = pathlib.PurePath(path.name)
        is_packed = name.suffix.lower() in _COMPRESSED
        ending = (pathlib.PurePath(name.stem) if is_packed else name).suffix.lower()
        if start.startswith((_PARQUET, _ARROW_FILE)):
            yield from _tables(path, start)
            return
        if start.startswith(_ARROW_STREAM):
            yield from _arrow(path, file)
            return
        _check_text(path, start)
        if ending in _TABLES:
            yield from _rows(path, file, _TABLES[ending], on_bad)
        elif ending in (*_LINES, _LIST):
            is_list = start.removeprefix(_BOM).lstrip().startswith(b"[")
            yield from (_list if is_list else _lines)(path, file, on_bad)
        else:
            yield {text_field: _text(path, file, start)}


@contextlib.contextmanager
def _opened(path: File) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed.

    Raises:
      InputError: it cannot be read, or not to its end.
    """
    try:
        with path.open() as file:
            start = file.peek(4)
            if not start.startswith((_GZIP, _ZSTD)):
                yield file
                return
            import pyarrow

            kind = "gzip" if start.startswith(_GZIP) else "zstd"
            with pyarrow.CompressedInputStream(file, kind) as stream, io.BufferedReader(stream) as whole:
                yield whole
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or str(error)[:200]})") from None


def _check_text(path: File, start: bytes) -> None:
    what = next((name for magic, name in _NAMED.items() if start.startswith(magic)), None)
    if what is None and start.startswith(_OTHER_UNICODE):
        what = "UTF-16"
    if what is None and b"\0" in start:
        what = "no text"
    if what is not None:
        raise InputError(
            f"{path} is {what}: give text in UTF-8, JSON lines, CSV, Parquet or Arrow, plain or compressed by gzip or"
            " zstd"
        )


def _text(path: File, file: IO[bytes], start: bytes) -> bytes:
    """All of a file of text, its lines divided by \\n, whichever system wrote it.

    Raises:
      InputError: it holds records in JSON, or no UTF-8.
    """
    _refuse_json(path, start)
    content = file.read().removeprefix(_BOM).replace(b"\r\n", b"\n")
    check = codecs.getincrementaldecoder("utf-8")()
    try:
        for first in range(0, len(content) + 1, _CHECKED_AT_ONCE):
            check.decode(content[first : first + _CHECKED_AT_ONCE])
        check.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 (Latin-1, perhaps): save it as UTF-8") from None
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _refuse_json(path: File, start: bytes) -> None:
    """Refuses records in JSON that would be read as one text."""
    first = start.removeprefix(_BOM).lstrip().split(b"\n", 1)[0].strip()
    is_list = first.startswith(b"[") and start.removeprefix(_BOM).lstrip()[1:].lstrip().startswith(b"{")
    try:
        is_object = first.startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_list or is_object:
        what, ending = ("a list of JSON objects", _LIST) if is_list else ("a JSON object on a line", _LINES[0])
        raise InputError(f"{path} begins with {what}, but is not named so: give it the ending {ending}")


def _wrong(path: File, place: str, number: int, what: str) -> InputError:
    return InputError(f"{path}, {place} {number}: {what}")


def _lines(path: File, file: IO[bytes], on_bad: OnBad) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line := line.removeprefix(_BOM).strip() if number == 1 else line.strip():
            try:
                record = _object(path, "line", number, line)
            except InputError as bad:
                if number == 1 and on_bad is refuse:
                    _refuse_one_document(path, line)
                on_bad(bad)
            else:
                yield record


def _refuse_one_document(path: File, line: bytes) -> None:
    """Refuses a file that is not made of lines, by its first line, which is no JSON object."""
    if b"\r" in line:
        raise InputError(f"{path} has lines that end in a carriage return alone: save it with line feeds (\\n)")
    if line.startswith(b"{") and line.endswith((b"{", b",", b"[")):
        raise InputError(
            f"{path} is one JSON document over several lines: one object on each line is needed, or a list of objects"
        )


def _object(path: File, place: str, number: int, text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise _wrong(path, place, number, "no UTF-8 (Latin-1, perhaps): save it as UTF-8") from None
    except _TwiceError:
        raise _wrong(path, place, number, "a JSON object with one field twice") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise _wrong(path, place, number, "no JSON object")
    return record


class _TwiceError(ValueError):
    """An object has two fields of one name."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _list(path: File, file: IO[bytes], on_bad: OnBad) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads(file.read().removeprefix(_BOM).decode(), object_pairs_hook=_once)
    except _TwiceError:
        raise InputError(f"{path} has a JSON object with one field twice") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON: give a list of objects, or one object on each line") from None
    for number, record in enumerate(found, start=1):
        if isinstance(record, dict):
            yield record
        else:
            on_bad(_wrong(path, "record", number, "no JSON object"))


def _rows(path: File, file: IO[bytes], delimiter: str, on_bad: OnBad) -> Iterator[dict[str, Any]]:
    """Of a table whose first row names the fields."""
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names) or "" in names:
            raise _wrong(path, "line", 1, "a header in which a name is missing or occurs twice")
        for values in reader:
            if values and len(values) != len(names):
                what = f"{len(values)} fields under a header of {len(names)}"
                on_bad(_wrong(path, "line", reader.line_num, what))
            elif values:
                yield dict(zip(names, values, strict=True))
    except UnicodeDecodeError:
        raise _wrong(path, "line", reader.line_num + 1, "no UTF-8, there or in the lines after it") from None
    except csv.Error as error:
        raise _wrong(path, "line", reader.line_num, f"no row of a table ({error})") from None
    finally:
        csv.field_size_limit(limit)


class _Piecewise:
    """A file that is read a mebibyte at a time, so that nobody asks for as much memory as a length in a damaged file
    says."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            whole: bytes = self._file.read()
            return whole
        parts, left = [], size
        while left and (part := self._file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _tables(path: File, start: bytes) -> Iterator[dict[str, Any]]:
    """Of a file whose parts are found from its end."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        with path.open() as opened:
            if start.startswith(_PARQUET):
                for batch in parquet.ParquetFile(_Piecewise(opened)).iter_batches(_AT_ONCE):
                    yield from _checked(batch)
                return
            file = ipc.open_file(_Piecewise(opened))
            for number in range(file.num_record_batches):
                yield from _checked(file.get_batch(number))
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0][:200]})") from None


def _checked(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch whose offsets lie inside it: Arrow follows others to anywhere in this process's memory."""
    batch.validate(full=True)
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _arrow(path: File, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import ipc

    try:
        for batch in ipc.open_stream(_Piecewise(file)):
            yield from _checked(batch)
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0][:200]})") from None


def _array_records(path: File, text_field: str, on_bad: OnBad) -> Iterator[dict[str, Any]]:
    """Of an ArrayRecord file, whose records are all of the kind of the first: JSON objects, examples of TensorFlow, or
    text.
    """
    from array_record.python import array_record_module

    if not isinstance(path, LocalFile):
        raise InputError(f"{path} is an ArrayRecord file, which can be read from a disk only: copy it to one")
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        if not count:  # so it also reads files that were cut off, and files of another kind
            raise InputError(f"{path} holds no record: it is no ArrayRecord file, or it was cut off")
        first = reader.read([0])[0]
    except InputError:
        raise
    except (ValueError, IndexError, RuntimeError, OSError) as error:
        raise InputError(f"{path} is no ArrayRecord file, or damaged ({str(error).splitlines()[0][:200]})") from None

    def read(begin: int, end: int) -> list[bytes]:
        try:
            return list(reader.read(begin, end))
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            raise InputError(f"{path} is damaged ({str(error).splitlines()[0][:200]})") from None

    is_json, is_example = first.lstrip().startswith(b"{"), bool(_example(first))
    for begin in range(0, count, _AT_ONCE):
        for number, content in enumerate(read(begin, min(begin + _AT_ONCE, count)), begin + 1):
            try:
                if is_json:
                    record = _object(path, "record", number, content)
                elif is_example:
                    record = _example(content)
                    if not record:
                        raise _wrong(path, "record", number, "no example of TensorFlow, as the first one is")
                else:
                    content.decode()
                    record = {text_field: content}
            except UnicodeDecodeError:
                on_bad(_wrong(path, "record", number, "no UTF-8"))
            except InputError as bad:
                on_bad(bad)
            else:
                yield record


def _example(content: bytes) -> dict[str, Any]:
    """The features of a tf.train.Example, single values by themselves; empty where it is none, or has none."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(content).features.feature
    except DecodeError:
        return {}
    found = {}
    for name, feature in features.items():
        values = list(getattr(feature, feature.WhichOneof("kind") or "int64_list").value)
        found[name] = values[0] if len(values) == 1 else values
    return found
