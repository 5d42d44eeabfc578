"""What the command line changes in its process: environment, loggers, hooks, signals, CPU devices. What joins several
processes is in peers.py.

The library changes none of it. Each change restores what it found, but for the number of CPU devices, which jax fixes
when it first looks at them.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from accounting.errors import InputError
from dpgemma.sharding.rules import wanted
from dpgemma.training.environment import DETERMINISTIC_SUMS

# What these libraries log as errors, they raise as well.
_LOGGERS = ("absl", "asyncio")
# Their threads and coroutines report a failed read or write again, after it has been raised.
_STORAGE = ("orbax", "tensorstore")

_MOST_CPU_DEVICES = 8


def install_quiet_hooks() -> Callable[[], None]:
    """Makes every error be reported once: by the exception that the program turns into a sentence.

    What leaves the main thread unhandled is printed as ever.

    Returns:
      What restores the hooks and the levels of the loggers.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    print_exception, print_unraisable = sys.excepthook, sys.unraisablehook

    def without_storage(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if _is_main_thread() or not _is_from_storage(trace):
            print_exception(kind, error, trace)

    def unraisable_without_storage(unraisable: Any) -> None:
        frame = getattr(unraisable.object, "cr_frame", None)  # of a coroutine that was dropped unfinished
        dropped = frame is not None and _is_storage(frame)
        # They read many arrays side by side in threads that no Python program began; where one read fails, the others
        # raise into such a thread.
        foreign = isinstance(threading.current_thread(), threading._DummyThread)
        if not (dropped or foreign or _is_from_storage(unraisable.exc_traceback)):
            print_unraisable(unraisable)

    def restore() -> None:
        sys.excepthook, sys.unraisablehook = print_exception, print_unraisable
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

    sys.excepthook, sys.unraisablehook = without_storage, unraisable_without_storage
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return restore


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_storage(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _STORAGE


def _is_from_storage(trace: types.TracebackType | None) -> bool:
    """Whether an exception passed through the storage layers."""
    while trace is not None:
        if _is_storage(trace.tb_frame):
            return True
        trace = trace.tb_next
    return False


def set_deterministic_sums() -> Callable[[], None]:
    """Sums on GPUs in a fixed order. To be called before jax is first used; flags that are set already are kept.

    Returns:
      What restores the environment.

    Raises:
      InputError: XLA_FLAGS names a file.
    """
    before = os.environ.get("XLA_FLAGS")
    if before and before.strip() and not before.strip().startswith("-"):
        raise InputError("XLA_FLAGS names a file: set it to the flags themselves, which the ledger records")
    if "xla_gpu_deterministic_ops" not in (before or ""):
        os.environ["XLA_FLAGS"] = f"{before or ''} {DETERMINISTIC_SUMS}".strip()

    def restore() -> None:
        if before is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = before

    return restore


@contextlib.contextmanager
def temporarily(change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Makes a change of the process, `install_quiet_hooks` or `set_deterministic_sums`, and undoes it at the end."""
    restore = change()
    try:
        yield
    finally:
        restore()


def split_cpu(mesh: str, num_processes: int = 1) -> None:
    """Makes as many CPU devices as this process has of a mesh; for "auto" one for each core, up to 8.

    It takes effect on the CPU alone, and only before jax first looks at its devices. From then on they stay.

    Args:
      num_processes: among which the devices of the mesh are divided.

    Raises:
      InputError: no mesh, or one that does not divide among the processes.
    """
    import jax

    cores = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES) if hasattr(os, "sched_getaffinity") else 1
    shape = wanted(mesh)
    if shape and shape.devices % num_processes:
        raise InputError(
            f"`mesh`={mesh} has {shape.devices} devices, which do not divide among {num_processes} processes"
        )
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", shape.devices // num_processes if shape else cores)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM has come; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
