"""Where a sweep's processes run: in slots of this machine, under Slurm, or on the nodes of a Ray cluster.

All launchers do the same: they execute command lines and tell how each ended. What a command does, and whether it has been done before,
is the sweep folder's to know, which all nodes must see under the same path.
"""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from accounting.errors import InputError

LOCAL, SLURM, RAY = "local", "slurm", "ray"
LAUNCHERS = (LOCAL, SLURM, RAY)
# What a launcher reports for a process that did not end by itself, as a shell does.
KILLED = 128
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Launcher(Protocol):
    """Executes commands. `slots` is how many it executes at once."""

    slots: int

    def run(self, commands: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
        """Executes every command once, and yields (its number, its exit code, what it wrote to standard error last) as each ends."""
        ...


def environment(cores: Sequence[int]) -> dict[str, str]:
    """The environment of a worker with cores of its own (none: wherever the system puts it, one thread).

    Threads change the order of sums, so a worker with one core has one thread wherever it runs: every launcher then computes the same
    bits. Its standard input is a pipe that ends with the process at the other end.
    """
    added = {"DPGEMMA_CORES": ",".join(map(str, cores)), "DPGEMMA_ENDS_WITH_INPUT": "1"}
    if len(cores) <= 1:
        added["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
    return {**os.environ, **added}


def execute(command: Sequence[str], cores: Sequence[int] = ()) -> tuple[int, str]:
    """Runs one worker to its end: (its exit code, what it wrote to standard error last)."""
    process = subprocess.Popen(
        list(command), env=environment(cores), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with _Registered(process):
        lines = process.stderr.read().strip().splitlines()
        code = process.wait()
    return (code if code >= 0 else KILLED - code), (lines[-1] if lines else "")


_children: set[subprocess.Popen] = set()
_guard = threading.Lock()


class _Registered:
    """Holds a process in the list of those that `stop_all` ends."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def __enter__(self):
        with _guard:
            _children.add(self._process)

    def __exit__(self, *_):
        with _guard:
            _children.discard(self._process)


def stop_all() -> None:
    """Asks every process that this one has started to save a checkpoint and end."""
    with _guard:
        for process in _children:
            process.send_signal(signal.SIGTERM)


class LocalPool:
    """Processes of this machine, each on cores of its own."""

    def __init__(self, slots: int | None = None):
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        self.slots = slots or len(available)
        share = max(1, len(available) // self.slots)
        self._cores = [
            available[i * share : (i + 1) * share] if self.slots <= len(available) else [available[i % len(available)]]
            for i in range(self.slots)
        ]

    def run(self, commands):
        free = list(self._cores)

        def in_slot(command):
            cores = free.pop()
            try:
                return execute(command, cores)
            finally:
                free.append(cores)

        with concurrent.futures.ThreadPoolExecutor(self.slots) as pool:
            futures = {pool.submit(in_slot, command): number for number, command in enumerate(commands)}
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield futures[future], *future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                stop_all()
                raise


class Slurm:
    """Slurm jobs, by submitit; `cluster="local"` lets submitit execute the same jobs as processes of this machine."""

    def __init__(self, slots: int | None, logs: pathlib.Path, *, cluster: str = "slurm", parameters: dict | None = None):
        try:
            import submitit
        except ImportError:
            raise InputError('--launcher=slurm needs submitit: pip install "dpgemma[sweep]"') from None
        self.slots = slots or 16
        try:
            self._executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            general = {"timeout_min": 24 * 60, "cpus_per_task": 1} | (parameters or {})
            self._executor.update_parameters(**general, **({"slurm_array_parallelism": self.slots} if cluster == "slurm" else {}))
        except (RuntimeError, NotImplementedError, NameError, TypeError) as error:
            raise InputError(f"submitit cannot reach {cluster}: {error}") from None
        self._one_by_one = cluster != "slurm"

    def run(self, commands):
        # submitit's local executor starts every job at once; Slurm itself keeps to the array's limit.
        size = self.slots if self._one_by_one else len(commands)
        for first in range(0, len(commands), size):
            jobs = self._submit(commands[first : first + size])
            pending = dict(enumerate(jobs, first))
            while pending:
                for number in [number for number, job in pending.items() if job.done()]:
                    yield number, *self._outcome(pending.pop(number))
                if pending:
                    next(iter(pending.values())).wait_briefly()

    def _submit(self, commands):
        if self._one_by_one:
            return [_Job(self._executor.submit(execute, command)) for command in commands]
        with self._executor.batch():
            jobs = [self._executor.submit(execute, command) for command in commands]
        return [_Job(job) for job in jobs]

    @staticmethod
    def _outcome(job) -> tuple[int, str]:
        return job.outcome()


class _Job:
    """A submitit job whose death is an outcome and no exception."""

    def __init__(self, job):
        self._job = job

    def done(self) -> bool:
        return self._job.done()

    def wait_briefly(self, seconds: float = 0.5) -> None:
        threading.Event().wait(seconds)

    def outcome(self) -> tuple[int, str]:
        error = self._job.exception()
        return self._job.result() if error is None else (KILLED, str(error).strip().splitlines()[-1] if str(error).strip() else "")


class Ray:
    """Tasks of a Ray cluster: an existing one, or one that is started for as long as the sweep lasts."""

    def __init__(self, slots: int | None = None, *, address: str | None = None):
        try:
            import ray
        except ImportError:
            raise InputError('--launcher=ray needs ray: pip install "dpgemma[sweep]"') from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise InputError(f"no Ray cluster answers at {address}: {error}") from None
        self.slots = slots or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(self, commands):
        # Ray itself tries again where a node or a worker of its own is lost.
        task = self._ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(execute)
        waiting, running = list(enumerate(commands))[::-1], {}
        while waiting or running:
            while waiting and len(running) < self.slots:
                number, command = waiting.pop()
                running[task.remote(list(command))] = number
            (ready, *_), _ = self._ray.wait(list(running), num_returns=1)
            try:
                outcome = self._ray.get(ready)
            except self._ray.exceptions.RayError as error:
                outcome = (KILLED, str(error).strip().splitlines()[-1])
            yield running.pop(ready), *outcome


def make(name: str, slots: int | None, logs: pathlib.Path) -> Launcher:
    """The launcher of a --launcher flag.

    Raises:
      InputError: a package or a cluster that is not there.
    """
    if name == SLURM:
        return Slurm(slots, logs)
    return Ray(slots, address=os.environ.get("RAY_ADDRESS")) if name == RAY else LocalPool(slots)


def worker_command(folder: pathlib.Path, ids: Sequence[str]) -> list[str]:
    """The command that executes these runs of a sweep, one after the other."""
    return [sys.executable, "-m", "experiments.sweep.worker", str(folder.absolute()), *ids]
