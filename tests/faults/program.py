"""The program in processes of its own that start quickly, on a disk that may be full or with a death at any call.

Processes are forked from one that has imported the program and has not used jax yet; each is a session of its own, so
that a kill ends it and all that it began.
"""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

from tests.training.runs import ENVIRONMENT, last_of_each

FULL, KILL, READ_ONLY = 0, 1, 2
Before = Callable[[], object] | None
_IMPORTED = ["dpgemma.cli", "dpgemma.commands.train", "dpgemma.training.prepare", "dpgemma.inference.exporting"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at the call number `at` that changes something below a folder.

    Attributes:
      kind: FULL or READ_ONLY, where the disk refuses this call and all later ones, or KILL.
      at: counted from 1; 0 for never.
    """

    folder: pathlib.Path
    kind: int
    at: int


@dataclasses.dataclass(frozen=True)
class Done:
    """How a process ended, as subprocess has it; `calls` that changed the fault's folder, if it lived to tell."""

    returncode: int
    out: str
    err: str
    calls: int


class Program:
    """Starts the program; made by `program`."""

    def __init__(self, place: pathlib.Path) -> None:
        self._place = place
        self._context = multiprocessing.get_context("forkserver")

    def start(self, *arguments: object, fault: Fault | None = None, before: Before = None) -> BaseProcess:
        """A process that runs the program.

        Args:
          before: a function that the process calls first.
        """
        for name in ("out", "err", "calls"):
            (self._place / name).unlink(missing_ok=True)
        process = self._context.Process(target=_run, args=(last_of_each(arguments), fault, before, self._place))
        process.start()
        return process

    def end_of(self, process: BaseProcess, limit: float = 240.0) -> Done:
        """Waits for it; one that takes longer than `limit` seconds is killed, which is a failure."""
        process.join(limit)
        if process.exitcode is None:
            kill(process)
            raise TimeoutError(f"the process was still there after {limit} seconds")
        assert process.exitcode is not None
        texts = [self._text(name) for name in ("out", "err", "calls")]
        return Done(process.exitcode, texts[0], texts[1], int(texts[2] or 0))

    def run(self, *arguments: object, fault: Fault | None = None, before: Before = None) -> Done:
        """Runs the program to its end."""
        return self.end_of(self.start(*arguments, fault=fault, before=before))

    def _text(self, name: str) -> str:
        path = self._place / name
        return path.read_text() if path.exists() else ""


def kill(process: BaseProcess) -> None:
    """SIGKILL for a process and for all that it began."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@contextlib.contextmanager
def program(place: pathlib.Path) -> Iterator[Program]:
    """The program, started from a process with the preloaded library; one such process in a test run.

    Args:
      place: a folder for what the processes say.
    """
    library = place / "disk.so"
    source = pathlib.Path(__file__).with_name("disk.c")
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the tests of faults need a C compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    before = dict(os.environ)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    os.environ.clear()
    os.environ.update(ENVIRONMENT | {"LD_PRELOAD": str(library)})
    try:
        found = Program(place)
        found.run("--version")  # starts the process that all others are forked from
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(arguments: list[str], fault: Fault | None, before: Before, place: pathlib.Path) -> None:
    os.setsid()
    files = [os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o600) for name in ("out", "err", "calls")]
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    disk = ctypes.CDLL(None)
    if fault is not None:
        disk.disk_fault_arm(str(fault.folder).encode(), fault.kind, ctypes.c_long(fault.at))
    if before is not None:
        before()
    from dpgemma import cli

    sys.argv = ["dpgemma", *arguments]
    try:
        cli.entry_point()
    finally:
        os.write(files[2], str(disk.disk_fault_calls()).encode())
