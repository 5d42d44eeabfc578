"""A run whose folder lies in an object storage.

The run is trained in a copy on this computer's disk, and everything that it writes is taken into the storage: lines of
the ledger before the step that they are about, reports and metrics with every checkpoint, checkpoints when their files
are complete. On Google Cloud Storage, which Orbax knows, every process writes its part of a checkpoint straight into
the storage instead. The storage alone counts. Whoever goes on starts from it, with an empty copy.

Formal guarantee: no step is computed whose line is not in the storage, and no two processes write the same line. So
where two train one run, against the lock, the second one to write a line ends before it computes that step, and every
step whose result anyone has seen is in the one ledger that the storage holds. Tested by
tests/training/storage_test.py::test_a_line_is_in_the_storage_before_its_step_is_computed and
::test_of_two_processes_that_write_the_same_line_one_ends.

Assumed: an object that was created is there for everybody from then on, and of two that create it one is refused, as
Google Cloud Storage and S3 promise. Whoever may read the storage can read private/.
"""

import atexit
import concurrent.futures
import contextlib
import fcntl
import pathlib
import re
import secrets
import shutil
import threading
import time
from typing import IO

from accounting import run_files
from accounting.errors import InputError
from dpgemma.storage.objects import Objects

_LINES = "ledger.d"  # one object for each line
_COMPLETE = ".complete"  # behind the number of a checkpoint whose files are all there
_COMMITTED = "commit_success.txt"  # in a checkpoint that Orbax has completed there
_LOCK = "lock"
# The holder of a lock renews it this often; others take it over after so long without a sign of life.
_BEAT_SECONDS, _PATIENCE_SECONDS = 10.0, 35.0


class HeldError(InputError):
    """Another process trains the run."""


class Mirror:
    """The storage's side of a run that this process trains.

    Attributes:
      folder: where the copy lies, or will lie.
      checkpoints_address: where checkpoints are written straight into the storage, its address; else None.
    """

    def __init__(
        self,
        address: str,
        copies: pathlib.Path,
        *,
        with_checkpoints: bool = False,
        beat_seconds: float = _BEAT_SECONDS,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        """Takes the lock and copies what the storage has.

        Args:
          address: of the run's folder.
          copies: folder of this computer in which copies lie.
          with_checkpoints: whether the copy shall have those too that are written straight into the storage.

        Raises:
          HeldError: another process trains the run.
          InputError: the address holds something else, or it cannot be used.
        """
        self.address = address
        self._objects = Objects(address)
        self.checkpoints_address = address if writes_checkpoints_itself(address) else None
        self._name = secrets.token_hex(16)  # by which the storage knows this process
        self.folder = copies / f"run-{self._name}"
        self._published: dict[str, str] = {}
        self._own_steps: set[str] = set()
        self._uploads = concurrent.futures.ThreadPoolExecutor(1)
        self._upload: concurrent.futures.Future[None] | None = None
        self._ended = threading.Event()
        names = self._objects.names()
        if names and _LOCK not in names and _line_name(0) not in names:
            raise InputError(f"{address} is neither empty nor the folder of a run: choose another `workdir`")
        self._held = _held_copy(copies, self.folder)
        atexit.register(self.close)
        self._beats = threading.Thread(target=self._show_life, args=(beat_seconds,), daemon=True)
        try:
            self._lock(patience_seconds)
            self._beats.start()
            if _line_name(0) in self._objects.names(_LINES):
                copy(self._objects, self.folder, with_checkpoints or self.checkpoints_address is None)
                kept = self.folder / run_files.CHECKPOINTS
                self._own_steps = {path.name for path in kept.iterdir()} if kept.is_dir() else set()
        except BaseException:
            self.close()
            raise

    def _lock(self, patience: float) -> None:
        trial = f"{_LOCK}.{self._name}"
        self._objects.create(trial, b"")
        is_replaced = self._objects.create(trial, b"")
        self._objects.delete([trial])
        if is_replaced:
            raise InputError(
                f"the storage of {self.address} replaces objects that it was asked to create: it cannot keep two"
                " processes from writing one ledger; use another storage, or a folder on a disk"
            )
        if not self._objects.create(_LOCK, self._sign(0)):
            if is_held(self._objects, patience):
                raise HeldError(
                    f"another process is training in {self.address}: wait for it, or choose another `workdir`"
                )
            self._objects.write(_LOCK, self._sign(0))

    def _sign(self, number: int) -> bytes:
        return f"{self._name} {number}\n".encode()

    def _show_life(self, seconds: float) -> None:
        number = 0
        while not self._ended.wait(seconds):
            number += 1
            try:
                if not self._has_lock():
                    return  # another one has taken the run over: the next line of the ledger ends this process
                self._objects.write(_LOCK, self._sign(number))
            except InputError:
                continue  # whether the storage can be reached again, the next line of the ledger shows

    def _has_lock(self) -> bool:
        return self._objects.read([_LOCK]).get(_LOCK, b"").startswith(self._name.encode())

    def _lost(self) -> InputError:
        return HeldError(
            f"another process has gone on with the run in {self.address}: this one ends before it computes another step"
        )

    def add_line(self, number: int, text: str) -> None:
        """Takes a line of the ledger into the storage.

        Args:
          number: from 0.

        Raises:
          InputError: another process has written this line, or the storage cannot be written.
        """
        content = f"{text}\n{self._name}\n".encode()
        if self._objects.create(_line_name(number), content):
            return
        # An answer that was lost on the way makes an object that this process has created.
        if self._objects.read([_line_name(number)]).get(_line_name(number)) != content:
            raise self._lost()

    def publish(self) -> None:
        """Takes the files of the copy into the storage that have changed; checkpoints come with `stored`.

        Raises:
          InputError: another process has the run by now, or the storage cannot be written.
        """
        if not self._has_lock():
            raise self._lost()
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            elsewhere = (run_files.CHECKPOINTS, run_files.DAMAGED, run_files.REMOVED)
            if not file.is_file() or name.startswith(tuple(f"{folder}/" for folder in elsewhere)):
                continue
            if name == run_files.LOCK or name.endswith(".tmp"):
                continue
            digest = run_files.file_digest(file)
            if self._published.get(name) != digest:
                self._objects.write(name, file.read_bytes())
                self._published[name] = digest

    def stored(self, step: int) -> None:
        """Begins to take a checkpoint into the storage whose files are complete, and removes those that the copy does
        not have any more.

        Raises:
          InputError: the one before could not be written.
        """
        self.wait()
        self._upload = self._uploads.submit(self._take, step)

    def _take(self, step: int) -> None:
        if not self._has_lock():
            raise self._lost()  # what the other one has written there since stays
        checkpoints, mark = self.folder / run_files.CHECKPOINTS, f"{run_files.CHECKPOINTS}/{step}{_COMPLETE}"
        files = {
            file.relative_to(self.folder).as_posix(): file
            for file in sorted((checkpoints / str(step)).rglob("*"))
            if file.is_file()
        }
        # A checkpoint without its mark is none, and what an attempt that broke off has left is no part of this one.
        left = [name for name in self._objects.names(f"{run_files.CHECKPOINTS}/{step}") if name not in files]
        self._objects.delete([mark, *left])
        for name, file in files.items():
            self._objects.upload(file, name)
        self._objects.write(mark, b"")
        self._own_steps.add(str(step))
        kept = {path.name for path in checkpoints.iterdir()}
        for gone in sorted(self._own_steps - kept):
            names = self._objects.names(f"{run_files.CHECKPOINTS}/{gone}")
            self._objects.delete([f"{run_files.CHECKPOINTS}/{gone}{_COMPLETE}", *names])
            self._own_steps.remove(gone)

    def wait(self) -> None:
        """Returns when the last checkpoint is in the storage.

        Raises:
          InputError: it could not be written.
        """
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Lets others have the run, and removes the copy."""
        self._uploads.shutdown(wait=True, cancel_futures=True)
        atexit.unregister(self.close)
        if not self._ended.is_set():
            self._ended.set()
            if self._beats.is_alive():
                self._beats.join()
            with contextlib.suppress(InputError):  # of a storage that cannot be reached: others wait for signs of life
                if self._has_lock():
                    self._objects.delete([_LOCK])
        _remove_copy(self.folder)
        self._held.close()


def _held_copy(copies: pathlib.Path, folder: pathlib.Path) -> IO[str]:
    """Marks a copy as that of a living process, as long as the file is open, and removes those of dead ones, which hold
    keys.
    """
    copies.mkdir(parents=True, exist_ok=True, mode=0o700)
    for mark in copies.glob("run-*.held"):
        try:
            with open(mark) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_copy(mark.with_suffix(""))
        except OSError:  # its process lives, or another one removes it now
            continue
    new = folder.with_name(f"{folder.name}.new")
    held = open(new, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    new.rename(folder.with_name(f"{folder.name}.held"))
    return held


def _remove_copy(folder: pathlib.Path) -> None:
    """Also the one under which a new run's folder is made, and the mark."""
    for path in (folder, *folder.parent.glob(f".{folder.name}.*.new")):
        shutil.rmtree(path, ignore_errors=True)
    folder.with_name(f"{folder.name}.held").unlink(missing_ok=True)


def writes_checkpoints_itself(address: str) -> bool:
    """Whether Orbax can write to the storage, from several processes too."""
    return address.startswith("gs://")


def is_held(objects: Objects, patience_seconds: float = _PATIENCE_SECONDS) -> bool:
    """Whether a process that is alive holds a run. Where there is a lock, it takes as long as the patience at most."""
    known, until = objects.read([_LOCK]).get(_LOCK), time.monotonic() + patience_seconds
    now = known
    while now is not None and now == known and time.monotonic() < until:
        time.sleep(min(1.0, patience_seconds / 10))
        now = objects.read([_LOCK]).get(_LOCK)
    return now is not None and now != known


def _line_name(number: int) -> str:
    return f"{_LINES}/{number:012}"


def copy(objects: Objects, folder: pathlib.Path, with_checkpoints: bool = True) -> None:
    """Copies a run out of the storage into a new folder: complete checkpoints, and every line of the ledger.

    Raises:
      InputError: there is no run, or one without its keys.
    """
    names = objects.names()
    if _line_name(0) not in names:
        raise InputError(f"{objects.address} is no run: it has no ledger")
    if run_files.KEYS not in names:
        untouched = _line_name(1) not in names
        raise InputError(
            f"{objects.address} is a run without its keys ({run_files.KEYS}): "
            + (
                "it ended before its first step; remove it, or choose another `workdir`"
                if untouched
                else "going on could spend the budget twice; restore them, or choose another `workdir`"
            )
        )
    mark = re.compile(rf"{run_files.CHECKPOINTS}/(\d+)({_COMPLETE}|/{_COMMITTED})")
    complete = {match[1] for name in names if with_checkpoints and (match := mark.fullmatch(name))}
    folder.mkdir(parents=True)
    (folder / run_files.PRIVATE).mkdir(mode=0o700)
    for name in names:
        place, _, rest = name.partition("/")
        is_part = place == run_files.CHECKPOINTS and rest.partition("/")[0] not in complete  # or a mark
        is_damaged = name.startswith(f"{run_files.DAMAGED}/")  # checkpoints that nobody uses any more
        if place != _LINES and not place.startswith(_LOCK) and not is_part and not is_damaged:
            objects.download(name, folder / name)
    for file in (folder / run_files.PRIVATE).rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    _complete_ledger(objects, folder / run_files.LEDGER, [name for name in names if name.startswith(f"{_LINES}/")])


def ledger_of(objects: Objects) -> str:
    """The ledger of a run, whole lines; empty where it has not begun."""
    names = objects.names(_LINES)
    contents = objects.read(names)
    return "".join(contents[name].decode().split("\n")[0] + "\n" for name in names)


def _complete_ledger(objects: Objects, file: pathlib.Path, lines: list[str]) -> None:
    """Appends the lines that are newer than the file."""
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    newer = [name for name in lines if name >= _line_name(whole.count("\n"))]
    contents = objects.read(newer)
    file.write_text(whole + "".join(contents[name].decode().split("\n")[0] + "\n" for name in newer))
