"""Runs that lie in an object storage, for the commands that look at finished or unfinished ones: as a copy on disk."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from dpgemma import user_cache
from dpgemma.commands import process
from dpgemma.storage import mirror
from dpgemma.storage.mirror import Mirror
from dpgemma.storage.objects import Objects, is_address


@contextlib.contextmanager
def for_reading(workdir: str) -> Iterator[pathlib.Path]:
    """The folder of a run, or a copy of it that lasts as long as the context.

    Raises:
      InputError: there is no run, or the storage cannot be read.
    """
    if not is_address(workdir):
        yield pathlib.Path(workdir)
        return
    with process.interrupt_on_sigterm(), tempfile.TemporaryDirectory(prefix="dpgemma-") as folder:
        copied = pathlib.Path(folder) / "run"
        mirror.copy(Objects(workdir), copied)
        yield copied


@contextlib.contextmanager
def for_writing(workdir: str) -> Iterator[tuple[pathlib.Path, Mirror | None]]:
    """The folder of a run; or a copy of it, and what takes it back into the storage.

    Raises:
      InputError: as for_reading, or another process trains the run.
    """
    if not is_address(workdir):
        yield pathlib.Path(workdir), None
        return
    taken = Mirror(workdir, user_cache.folder() / "copies", with_checkpoints=True)
    try:
        yield taken.folder, taken
    finally:
        taken.close()


def is_held(workdir: str) -> bool:
    """Whether a process is training a run that lies in an object storage."""
    return is_address(workdir) and mirror.is_held(Objects(workdir))
