"""Where documents come from: the synthetic corpus, text files, JSONL files, and TFDS data sets already on disk.

Every source yields documents as bytes in a fixed order. Nothing is ever downloaded.
"""

import glob
import json
import os
import pathlib
from collections.abc import Iterator

from accounting.errors import InputError

SYNTHETIC = "synthetic"
TFDS_PREFIX = "tfds:"
_READ_BATCH = 1024


def documents(data: str, text_field: str = "text") -> Iterator[bytes]:
    """The documents that --data names.

    Args:
      data: "synthetic", "tfds:NAME" or "tfds:DIRECTORY", a path or glob of text files (one document each) or of .jsonl files (one
        document per line, in `text_field`).

    Raises:
      InputError: nothing there, or a record without the field.
    """
    if data == SYNTHETIC:
        from dpgemma.data import synthetic

        yield from _tfds_documents(synthetic.prepared(), "text")
    elif data.startswith(TFDS_PREFIX):
        yield from _tfds_documents(_prepared_builder(data.removeprefix(TFDS_PREFIX)), text_field)
    else:
        for path in _files(data):
            yield from _jsonl_documents(path, text_field) if path.suffix == ".jsonl" else [path.read_bytes()]


def _files(data: str) -> list[pathlib.Path]:
    paths = [pathlib.Path(p) for p in sorted(glob.glob(os.path.expanduser(data))) if os.path.isfile(p)]
    if not paths:
        raise InputError(f"no file matches --data={data}: give a text or .jsonl file, a glob, tfds:NAME, or {SYNTHETIC}")
    return paths


def _jsonl_documents(path: pathlib.Path, text_field: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number}: no JSON object with a string in {text_field!r}; see --text_field")
            yield text.encode()


def _prepared_builder(name: str):
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
            f"cannot read TFDS data set {name!r} ({reason}): prepare it on disk first, in ArrayRecord format, with a train split"
        ) from None


def _tfds_documents(builder, text_field: str) -> Iterator[bytes]:
    source = builder.as_data_source(split="train")
    for first in range(0, len(source), _READ_BATCH):
        for record in source.__getitems__(range(first, min(first + _READ_BATCH, len(source)))):
            text = record.get(text_field)
            if not isinstance(text, (bytes, str)):
                raise InputError(f"TFDS data set {builder.name!r} has no text in field {text_field!r}; see --text_field")
            yield text if isinstance(text, bytes) else text.encode()
