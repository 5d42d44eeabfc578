"""Is every file of the folder one that the run wrote?

private/ may hold anything: it is the place for what the guarantee does not cover.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.ledger import events
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed

# The names that Orbax gives to the files of a checkpoint.
_LAYOUT = re.compile(
    r"_CHECKPOINT_METADATA(\.tmp)?|commit_success\.txt|(meta|state)/commit_success\.txt|meta/metadata"
    r"|state/(_METADATA|_sharding|manifest\.ocdbt|d/[0-9a-f]{32}|array_metadatas/process_\d+)"
    r"|state/ocdbt\.process_\d+/(manifest\.ocdbt|d/[0-9a-f]{32})"
)
_FOLDERS = re.compile(r"meta|state(/(d|array_metadatas|ocdbt\.process_\d+(/d)?))?")
_HALF_WRITTEN = re.compile(r"\d+\.orbax-checkpoint-tmp(-\d+)?")
_SET_ASIDE = re.compile(r"damaged-\d+(\.\d+)?")  # as versions before the fourth format named them


def is_regular(path: pathlib.Path) -> bool:
    """Whether a path is a file of its own: neither a link nor a pipe, whose content lies elsewhere."""
    return path.is_file() and not path.is_symlink()


def other_files(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Regular files that are neither the run's public files, nor in private/, nor in the folder of a checkpoint."""
    return [path for path in _outside(workdir) if is_regular(path)]


def accounted(
    workdir: pathlib.Path, lines: Sequence[Line], executed: Executed | None, exports: Sequence[pathlib.Path]
) -> Iterator[Finding]:
    """Files that are none of the run's.

    Args:
      executed: None where the ledger says nothing; then checkpoints are not looked into.
      exports: folders inside the run's that hold exported weights, each of which is checked by itself.
    """
    unfinished = executed is not None and not executed.finished
    for path in _outside(workdir):
        if path.parent in exports and is_regular(path):
            continue
        left_over = path.parent == workdir and path.name.removesuffix(".tmp") in run_files.PUBLIC_FILES
        if not (left_over and unfinished and is_regular(path)):
            yield _unknown(workdir, path)
    for name in run_files.PUBLIC_FILES:
        if (workdir / name).exists() and not is_regular(workdir / name):
            yield _unknown(workdir, workdir / name)
    if executed is not None:
        for folder in _checkpoint_folders(workdir):
            yield from _checkpoint(workdir, folder, lines, executed)


def _unknown(workdir: pathlib.Path, path: pathlib.Path) -> Finding:
    what = "the run did not write it" if path.is_file() or path.is_dir() else "it is no file"
    what = "it is a link" if path.is_symlink() else what
    return Finding("file_unknown", path.relative_to(workdir).as_posix(), f"{what}; nothing says what it holds")


def _outside(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything but folders that lies outside private/, checkpoints' folders and the public files."""
    checkpoints = set(_checkpoint_folders(workdir))
    for place, folders, files in os.walk(workdir):
        here = pathlib.Path(place)
        if here == workdir:
            folders[:] = [name for name in folders if name != run_files.PRIVATE]
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if here / name not in checkpoints]
        if not folders and not files and here != workdir and here != workdir / run_files.CHECKPOINTS:
            yield here  # an empty folder, whose name nothing explains
        for name in sorted([*links, *files]):
            own = here == workdir and name in (*run_files.PUBLIC_FILES, *run_files.FOLDERS)
            if not own and here / name not in checkpoints:
                yield here / name
    # The folder of checkpoints may lie on another disk.
    if (workdir / run_files.CHECKPOINTS).is_symlink():
        for path in sorted((workdir / run_files.CHECKPOINTS).iterdir()):
            if path not in checkpoints:
                yield path


def _checkpoint_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders in checkpoints/ whose names are those of checkpoints, whole or half written."""
    folder = workdir / run_files.CHECKPOINTS
    if not folder.is_dir():
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir()
        and not path.is_symlink()
        and (path.name.isdecimal() or _HALF_WRITTEN.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name))
    ]


def _checkpoint(
    workdir: pathlib.Path, folder: pathlib.Path, lines: Sequence[Line], executed: Executed
) -> Iterator[Finding]:
    """The files of one checkpoint: those that the ledger recorded, or such as a crash can leave behind."""
    name = folder.relative_to(workdir).as_posix()
    old = executed.version < events.PLACES
    of_checkpoints = (events.CHECKPOINT, events.STORED)
    places = [line.record for line in lines if line.record["kind"] in of_checkpoints]
    stored = [record for record in places if record["kind"] == events.STORED and str(record["step"]) == folder.name]
    cut_off = not executed.finished and (
        bool(_HALF_WRITTEN.fullmatch(folder.name))
        or (bool(places) and places[-1]["kind"] == events.CHECKPOINT and str(places[-1]["step"]) == folder.name)
    )
    for path in sorted(folder.rglob("*")):
        empty = path.is_dir() and not any(path.iterdir())
        if empty and not (cut_off and _FOLDERS.fullmatch(_final_name(folder, path))):
            yield _unknown(workdir, path)
    if stored:
        if run_files.folder_digest(folder) != stored[-1]["files_sha256"]:
            yield Finding("checkpoint_disagrees", name, "its files are not those whose SHA-256 the ledger recorded")
        return
    if not old and not cut_off:
        yield Finding("file_unknown", name, "the ledger did not record its files")
        return
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or (not path.is_dir() and not _LAYOUT.fullmatch(_final_name(folder, path))):
            yield _unknown(workdir, path)


def _final_name(folder: pathlib.Path, path: pathlib.Path) -> str:
    """The name of a file as it will be called when its checkpoint is whole."""
    return re.sub(r"\.orbax-checkpoint-tmp(-\d+)?|\.__lock", "", path.relative_to(folder).as_posix())
