"""Where documents come from: the synthetic corpus, text files, JSONL files, and TFDS data sets already on disk.

Every source yields records, or the documents in one of their fields as bytes, in a fixed order. Nothing is ever
downloaded.
"""

import glob
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from accounting.errors import InputError
from dpgemma.data.text.tokenizer import utf8

SYNTHETIC = "synthetic"
TFDS_PREFIX = "tfds:"
_READ_BATCH = 1024


def documents(data: str, text_field: str = "text") -> Iterator[bytes]:
    """The documents that `data` names: one field of every record.

    Raises:
      InputError: nothing there, or a record without text in that field.
    """
    for number, record in enumerate(records(data, text_field), start=1):
        text = record.get(text_field)
        if not isinstance(text, (bytes, str)):
            raise InputError(
                f"record {number} of `data`={data} has no text in field {text_field!r}: see `text_field`, or"
                " `privacy_unit`=example for records with prompt and response or with messages"
            )
        yield text if isinstance(text, bytes) else utf8(text)


def records(data: str, text_field: str = "text") -> Iterator[dict[str, Any]]:
    """The records that `data` names.

    Args:
      data: "synthetic", "tfds:NAME" or "tfds:DIRECTORY", a path or glob of text files (one record each, with one field)
        or of .jsonl files (one record per line).
      text_field: what the only field is called where the source has no names for fields.

    Raises:
      InputError: nothing there, or a line that is no JSON object.
    """
    if data == SYNTHETIC:
        from dpgemma.data import synthetic

        yield from ({text_field: record["text"]} for record in _tfds_records(synthetic.prepared()))
    elif data.startswith(TFDS_PREFIX):
        yield from _tfds_records(_prepared_builder(data.removeprefix(TFDS_PREFIX)))
    else:
        for path in _files(data):
            yield from _jsonl_records(path) if path.suffix == ".jsonl" else [{text_field: path.read_bytes()}]


def _files(data: str) -> list[pathlib.Path]:
    paths = [pathlib.Path(p) for p in sorted(glob.glob(os.path.expanduser(data))) if os.path.isfile(p)]
    if not paths:
        raise InputError(
            f"no file matches `data`={data}: give a text or .jsonl file, a glob, tfds:NAME, or {SYNTHETIC}"
        )
    return paths


def _jsonl_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: no JSON object")
            yield record


def _prepared_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(os.path.expanduser(name)):
            return tfds.builder_from_directory(os.path.expanduser(name))
        builder = tfds.builder(name)
        builder.as_data_source(split="train")
        return builder
    except Exception as error:  # TFDS raises many types, ModuleNotFoundError for other formats among them
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"cannot read TFDS data set {name!r} ({reason}): prepare it on disk first, in ArrayRecord format, with a"
            " train split"
        ) from None


def _tfds_records(builder: Any) -> Iterator[dict[str, Any]]:
    source = builder.as_data_source(split="train")
    for first in range(0, len(source), _READ_BATCH):
        yield from source.__getitems__(range(first, min(first + _READ_BATCH, len(source))))
