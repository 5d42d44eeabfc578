"""Where records come from: the synthetic corpus, files of records, folders of them, and data sets of TFDS and Hugging
Face that are on disk already.

Every source yields its records in a fixed order. Nothing is ever downloaded.
"""

import glob
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from accounting.errors import InputError
from dpgemma.data import formats
from dpgemma.data.formats import File, LocalFile, OnBad, refuse
from dpgemma.data.text import cache
from dpgemma.storage import objects
from dpgemma.storage.objects import StoredFile, is_address

SYNTHETIC = "synthetic"
TFDS_PREFIX = "tfds:"
_READ_BATCH = 1024
# Of Hugging Face's datasets: a set of several parts, and the files of one.
_SPLITS, _STATE = "dataset_dict.json", "state.json"
_TFDS = "features.json"  # in a folder that TFDS prepared


def records(data: str, text_field: str = "text", on_bad: OnBad = refuse) -> Iterator[dict[str, Any]]:
    """The records that `data` names.

    Args:
      data: "synthetic", "tfds:NAME" or "tfds:DIRECTORY", or files of the kinds that data.formats knows, on a disk or at
        gs:// or s3://: a path, a glob (** for folders within folders), a folder with all that is in it, or (on a disk)
        one that Hugging Face's datasets saved.
      text_field: what the only field is called where the source has no names for fields.
      on_bad: told what is wrong with a record that cannot be read.

    Raises:
      InputError: nothing there, or a line that is no JSON object.
    """
    builder = _builder(data)
    if builder is not None:
        for record in _tfds_records(builder):
            yield {text_field: record["text"]} if data == SYNTHETIC else record
    else:
        for path in _files(data):
            yield from formats.records(path, text_field, on_bad)


def files(data: str) -> Sequence[File]:
    """The files that hold the records of `data`, in a fixed order.

    Raises:
      InputError: nothing there.
    """
    builder = _builder(data)
    if builder is None:
        return _files(data)
    folder = pathlib.Path(builder.data_path)
    return [LocalFile(path) for path in sorted(folder.iterdir()) if path.is_file()]


def _files(data: str) -> Sequence[File]:
    if is_address(data):
        return _stored(data)
    found = pathlib.Path(os.path.expanduser(data))
    if found.is_dir():
        paths = _of_data_set(found) or sorted(path for path in found.rglob("*") if _is_meant(path, found))
    elif found.is_file():  # whatever characters its name has
        paths = [found]
    else:
        paths = _matched(str(found))
    if found.is_dir() and any(path.name == cache.FACTS for path in paths):
        raise InputError(f"`data`={data} holds a token cache: name the folder of its {cache.FACTS}, or of the records")
    if not paths:
        raise InputError(f"no file matches `data`={data}: give a file, a folder, a glob, tfds:NAME, or {SYNTHETIC}")
    return [LocalFile(path) for path in _each_once(paths)]


def _matched(pattern: str) -> list[pathlib.Path]:
    """The files that a glob matches.

    Raises:
      InputError: it also matches a folder with files that it does not match.
    """
    matches = [pathlib.Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    paths = [path for path in matches if path.is_file()]
    known = set(paths)
    for folder in (path for path in matches if path.is_dir()):
        if any(path not in known for path in folder.rglob("*") if _is_meant(path, folder)):
            raise InputError(
                f"`data`={pattern} matches the folder {folder}, whose files it does not match: give a pattern with **"
                " for files in folders within folders, or one that matches files only"
            )
    return paths


def _each_once(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """The paths, without those that lead to the file of an earlier one."""
    found: dict[str, pathlib.Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _stored(address: str) -> list[StoredFile]:
    """Files in an object storage.

    Raises:
      InputError: none, or those of a data set whose parts are told apart by files that lie beside them.
    """
    found = [file for file in objects.files(address) if not any(p.startswith(".") for p in str(file).split("/"))]
    if not found:
        raise InputError(f"no object matches `data`={address}: give an object, a folder or a glob")
    if marks := sorted({_SPLITS, _STATE, _TFDS, cache.FACTS} & {file.name for file in found}):
        raise InputError(
            f"`data`={address} is a data set of several files ({marks[0]} among them), which can be read from a disk"
            " only: copy it to one, or name the files of records by a glob"
        )
    return found


def _is_meant(path: pathlib.Path, folder: pathlib.Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden


def _of_data_set(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that datasets.Dataset.save_to_disk wrote, in their order; none of another one.

    Raises:
      InputError: several splits, and none that is called train.
    """
    if (folder / _SPLITS).is_file():
        splits = json.loads((folder / _SPLITS).read_text()).get("splits", [])
        if "train" not in splits:
            raise InputError(f"`data`={folder} has the splits {', '.join(splits)}: give the folder of one of them")
        folder = folder / "train"
    if not (folder / _STATE).is_file():
        return []
    return [folder / part["filename"] for part in json.loads((folder / _STATE).read_text())["_data_files"]]


def _builder(data: str) -> Any:
    """The TFDS builder of data that TFDS prepared; None for other files."""
    if data == SYNTHETIC:
        from dpgemma.data import synthetic

        return synthetic.prepared()
    if data.startswith(TFDS_PREFIX):
        return _prepared_builder(data.removeprefix(TFDS_PREFIX))
    if is_address(data):
        return None
    return _prepared_builder(data) if (pathlib.Path(os.path.expanduser(data)) / _TFDS).is_file() else None


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
