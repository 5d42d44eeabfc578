"""The files of a run's checkpoints: on a disk, or where Orbax writes them straight into an object storage."""

import json
import pathlib
import shutil
from typing import Any, Protocol

from accounting import run_files
from dpgemma.storage.objects import Objects

_METADATA = "_CHECKPOINT_METADATA"  # as Orbax calls it


class CheckpointFiles(Protocol):
    """What Orbax does not do for checkpoints.

    Attributes:
      directory: that Orbax is given.
    """

    directory: Any

    @property
    def removed(self) -> str | None:
        """The folder that Orbax moves a checkpoint to in place of deleting it, so that a process which dies while it
        deletes leaves no part of one; None where Orbax deletes.
        """

    def delete_removed(self) -> None:
        """Deletes what was moved to `removed`."""

    def strip_times(self, step: int) -> bool:
        """Takes out of a checkpoint's metadata when it was written: a long step is one with many units. False if there
        are no metadata.
        """

    def digest(self, step: int) -> str:
        """As run_files.folder_digest has it."""

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint that cannot be used to private/, because nobody has checked what it holds."""


class OnDisk:
    """Checkpoints in a folder."""

    def __init__(self, directory: pathlib.Path, damaged: pathlib.Path) -> None:
        self.directory, self._damaged = directory.absolute(), damaged

    @property
    def removed(self) -> str | None:
        """In private/, where that lies on the disk of the checkpoints: a folder goes to another disk file by file."""
        there = self.directory if self.directory.exists() else self.directory.parent
        private = self.directory.parent / run_files.PRIVATE
        here = private if private.exists() else self.directory.parent
        same_disk = there.stat().st_dev == here.stat().st_dev
        return str(self.directory.parent / run_files.REMOVED) if same_disk else None

    def delete_removed(self) -> None:
        shutil.rmtree(self.directory.parent / run_files.REMOVED, ignore_errors=True)

    def strip_times(self, step: int) -> bool:
        metadata = self.directory / str(step) / _METADATA
        if metadata.is_file():
            run_files.write(metadata, _without_times(metadata.read_bytes()))
        return metadata.is_file()

    def digest(self, step: int) -> str:
        return run_files.folder_digest(self.directory / str(step))

    def set_aside(self, step: int) -> None:
        self._damaged.mkdir(parents=True, exist_ok=True)
        target, number = self._damaged / str(step), 1
        while target.exists():
            target, number = self._damaged / f"{step}.{number}", number + 1
        shutil.move(self.directory / str(step), target)  # which may lie on another disk


class InStorage:
    """Checkpoints under an address. Their files are read once more for their digests."""

    @property
    def removed(self) -> str | None:
        return None

    def delete_removed(self) -> None:
        pass

    def __init__(self, address: str) -> None:
        from etils import epath

        self._objects = Objects(address)
        self.directory = epath.Path(self._objects.address) / run_files.CHECKPOINTS

    def strip_times(self, step: int) -> bool:
        name = f"{run_files.CHECKPOINTS}/{step}/{_METADATA}"
        found = self._objects.read([name])
        if found:
            self._objects.write(name, _without_times(found[name]).encode())
        return bool(found)

    def digest(self, step: int) -> str:
        folder = f"{run_files.CHECKPOINTS}/{step}"
        names = [name for name in self._objects.names(folder) if not name.endswith("/")]
        return run_files.digest_of_files(
            {name.removeprefix(f"{folder}/"): self._objects.digest(name) for name in names}
        )

    def set_aside(self, step: int) -> None:
        taken = {name.split("/")[2] for name in self._objects.names(run_files.DAMAGED)}
        target = next(name for name in (str(step), *(f"{step}.{i}" for i in range(1, 10**6))) if name not in taken)
        self._objects.move(f"{run_files.CHECKPOINTS}/{step}", f"{run_files.DAMAGED}/{target}")


def _without_times(metadata: bytes) -> str:
    stored = json.loads(metadata)
    return json.dumps(stored | {name: None for name in stored if name.endswith("_timestamp_nsecs")})
