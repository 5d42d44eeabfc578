"""Folders that appear complete or not at all."""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder under a temporary name that becomes `path` when all went well, and disappears otherwise.

    What killed processes left of the same folder is removed. A process locks the folder that it writes, so one that is
    still being written stays.

    Args:
      path: does not exist, or is an empty folder.

    Raises:
      OSError: the disk refuses, or `path` has been filled in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    temporary, descriptor = _locked_folder(path)
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _locked_folder(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    while True:
        # Processes of other machines may have this one's number.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.new")
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for one that was left
            continue
        with contextlib.suppress(OSError):  # of file systems without locks; nothing is removed there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # no other process took it for one that was left, in between
            return temporary, descriptor
        os.close(descriptor)


def _remove_left(path: pathlib.Path) -> None:
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+(-[0-9a-f]{8})?\.new")
    for left in [each for each in path.parent.iterdir() if ours.fullmatch(each.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
