"""Where a sweep's processes run: in slots of this machine, under Slurm, or on the nodes of a Ray cluster.

All launchers do the same: they execute command lines and tell how each ended. What a command does, and whether it has
been done before, is the sweep folder's to know, which all nodes must see under the same path or address.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from accounting.errors import InputError
from dpgemma.choices import LAUNCHERS
from experiments.sweep import gpus, tpus

_, SLURM, RAY = LAUNCHERS
# What a launcher reports for a process that did not end by itself, as a shell does.
KILLED = 128
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_INTERVAL = 0.1
# Seconds that Ray's tasks have, once the sweep is interrupted, to save a checkpoint.
_GRACE = 60.0
# Jobs of one Slurm array; clusters rarely allow more than 1000.
_LARGEST_ARRAY = 1000


class Launcher(Protocol):
    """Executes commands. `slots` is how many it executes at once."""

    slots: int

    def run(self, commands: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
        """Executes every command once, and yields (its number, its exit code, what it wrote to standard error last) as
        each ends.

        Where the iterator is closed before its end, the processes that still run are told to save a checkpoint and end.
        """
        ...


def environment(cores: Sequence[int]) -> dict[str, str]:
    """The environment of a worker with cores of its own (none: wherever the system puts it), but for its GPUs.

    Threads change the order of sums, so a worker has one thread wherever it runs: every launcher then computes the same
    bits. Its standard input is a pipe that ends with the process at the other end.
    """
    added = {"DPGEMMA_CORES": ",".join(map(str, cores)), "DPGEMMA_ENDS_WITH_INPUT": "1"}
    return {**os.environ, **added, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()}


class Process:
    """A worker, in a session of its own: Ctrl-C reaches it through the launcher alone, as a request to save a
    checkpoint.
    """

    def __init__(
        self, command: Sequence[str], directory: str, cores: Sequence[int] = (), gpus: dict[str, str] | None = None
    ):
        self._errors = tempfile.TemporaryFile()  # not a pipe, which somebody would have to empty
        self._process = subprocess.Popen(
            list(command), cwd=directory, env=environment(cores) | (gpus or {}), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
        )  # fmt: skip

    def outcome(self) -> tuple[int, str] | None:
        """(its exit code, what it wrote to standard error last), once it has ended."""
        code = self._process.poll()
        if code is None:
            return None
        self._process.stdin.close()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        return (code if code >= 0 else KILLED - code), (lines[-1] if lines else "")

    def stop(self) -> None:
        """Asks it to save a checkpoint and end."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        while (outcome := self.outcome()) is None:
            time.sleep(_INTERVAL)
        return outcome


def execute(command: Sequence[str], directory: str) -> tuple[int, str]:
    """Runs one worker to its end, in a job of another launcher: (its exit code, what it wrote to standard
    error last)."""
    process = Process(command, directory)
    try:
        return process.wait()
    except BaseException:
        process.stop()
        process.wait()
        raise


class LocalPool:
    """Processes of this machine, each on devices of its own: GPUs or TPU chips where jax would use them, and else
    cores.

    Args:
      slots: processes at once; by default as many as there are devices for.
      devices: of each process.

    Raises:
      InputError: there are GPUs or TPU chips, but fewer than a process needs.
    """

    def __init__(self, slots: int | None = None, devices: int = 1):
        available = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        kind = gpus if gpus.here() else tpus
        names = kind.here()
        self.slots = slots or max(1, len(names or available) // devices)
        each = max(1, len(available) // self.slots) if names else min(devices, len(available))
        cores = [[available[(slot * each + i) % len(available)] for i in range(each)] for slot in range(self.slots)]
        self._places = list(
            zip(cores, kind.divided(names, devices, self.slots) if names else [{}] * self.slots, strict=True)
        )

    def run(self, commands):
        waiting, free = list(enumerate(commands))[::-1], list(self._places)
        running: dict[int, tuple[Process, tuple]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    number, command = waiting.pop()
                    place = free.pop()
                    running[number] = (Process(command, os.getcwd(), *place), place)
                time.sleep(_INTERVAL)
                for number, (process, place) in list(running.items()):
                    outcome = process.outcome()
                    if outcome is not None:
                        del running[number]
                        free.append(place)
                        yield number, *outcome
        finally:
            for process, _ in running.values():
                process.stop()
            for process, _ in running.values():
                process.wait()


class Slurm:
    """Slurm jobs, by submitit; `cluster="local"` lets submitit execute the same jobs as processes of this machine.

    Args:
      slots: jobs at once.
      logs: submitit's folder.
      parameters: of submitit, such as {"partition": "gpu", "timeout_min": 60}; by default a day and a core for each
        device of a run. GPUs have to be asked for: {"gres": "gpu:1"}.
    """

    def __init__(
        self,
        slots: int | None,
        logs: pathlib.Path,
        *,
        cluster: str = SLURM,
        devices: int = 1,
        parameters: dict | None = None,
    ):
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # its log would go to standard output
        try:
            import submitit
            from submitit.auto.auto import AutoExecutor
        except ImportError:
            raise InputError('`launcher`=slurm needs submitit: pip install "dpgemma[sweep]"') from None
        self.slots = slots or 16
        general = AutoExecutor._typed_parameters()
        named = {name if name in general else f"slurm_{name}": value for name, value in (parameters or {}).items()}
        # Slurm itself keeps to the array's limit; submitit's local executor starts every job at once.
        limit = {"slurm_array_parallelism": self.slots} if cluster == SLURM else {}
        self._largest = _LARGEST_ARRAY if cluster == SLURM else self.slots
        try:
            self._executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, "cpus_per_task": devices} | named | limit)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"there is no Slurm here ({error}): run this where sbatch and srun are, or use another `launcher`"
            ) from None
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise InputError(f"`slurm_parameters` are not submitit's: {error}") from None

    def run(self, commands):
        waiting, running = list(enumerate(commands))[::-1], {}
        try:
            while waiting or running:
                chosen = [waiting.pop() for _ in range(min(len(waiting), self._largest - len(running)))]
                if chosen:
                    with self._executor.batch():
                        jobs = [self._executor.submit(execute, list(command), os.getcwd()) for _, command in chosen]
                    running |= {number: job for (number, _), job in zip(chosen, jobs, strict=True)}
                time.sleep(_INTERVAL)
                for number in [number for number, job in running.items() if job.done()]:
                    yield number, *self._outcome(running.pop(number))
        finally:
            for job in running.values():
                job.cancel(check=False)

    @staticmethod
    def _outcome(job) -> tuple[int, str]:
        """Returns (exit code, last line of standard error); a job that died has code KILLED."""
        error = job.exception()
        return job.result() if error is None else (KILLED, _last_line(error))


class Ray:
    """Tasks of a Ray cluster: an existing one, or one that is started for as long as the sweep lasts.

    Where jax would use GPUs here and the cluster has some, each task asks for as many as a run has devices; else for
    cores.
    """

    def __init__(self, slots: int | None = None, *, devices: int = 1, address: str | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError('`launcher`=ray needs ray: pip install "dpgemma[sweep]"') from None
        self._ray = ray
        if not ray.is_initialized():
            own = {} if address else {"num_cpus": slots * devices if slots else None}
            try:
                ray.init(
                    address=address,
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    configure_logging=False,
                    **own,
                )
            except (ConnectionError, ValueError) as error:
                raise InputError(f"no Ray cluster answers at {address}: {_last_line(error)}") from None
        there = ray.cluster_resources()
        kind = "GPU" if gpus.usable() and there.get("GPU", 0) else "CPU"
        self._asked = {"num_cpus": devices} if kind == "CPU" else {"num_cpus": 1, "num_gpus": devices}
        self.slots = slots or max(1, int(there.get(kind, 1)) // devices)

    def run(self, commands):
        # Ray itself tries again where a node or a worker of its own is lost.
        task = self._ray.remote(**self._asked, max_retries=3, scheduling_strategy="SPREAD")(execute)
        waiting, running = list(enumerate(commands))[::-1], {}
        try:
            while waiting or running:
                while waiting and len(running) < self.slots:
                    number, command = waiting.pop()
                    running[task.remote(list(command), os.getcwd())] = number
                for ready in self._ray.wait(list(running), num_returns=1, timeout=1)[0]:
                    yield running.pop(ready), *self._outcome(ready)
        finally:
            for reference in running:
                self._ray.cancel(reference)
            if running:
                self._ray.wait(list(running), num_returns=len(running), timeout=_GRACE)

    def _outcome(self, reference) -> tuple[int, str]:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return KILLED, _last_line(error)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def make(
    name: str, slots: int | None, logs: pathlib.Path, *, devices: int = 1, slurm_parameters: str | None = None
) -> Launcher:
    """The launcher of a --launcher flag.

    Args:
      slots: processes at once; None for the launcher's default.
      logs: folder for what a launcher writes itself.
      devices: of each process.
      slurm_parameters: as the flag of that name says them.

    Raises:
      InputError: a package or a cluster that is not there, or parameters that do not exist.
    """
    if slurm_parameters and name != SLURM:
        raise InputError("`slurm_parameters` are for `launcher`=slurm: drop them, or use it")
    if name == SLURM:
        return Slurm(slots, logs, devices=devices, parameters=parse_parameters(slurm_parameters or ""))
    return (
        Ray(slots, devices=devices, address=os.environ.get("RAY_ADDRESS")) if name == RAY else LocalPool(slots, devices)
    )


def parse_parameters(text: str) -> dict[str, str | int | float]:
    """ "partition=gpu,mem_gb=8" as {"partition": "gpu", "mem_gb": 8}.

    Raises:
      InputError: a part without a name or a value.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if not (name and value):
            raise InputError(f"`slurm_parameters` must look like partition=gpu,timeout_min=60, got {part!r}")
        found[name] = value
        for kind in (float, int):
            with contextlib.suppress(ValueError):
                found[name] = kind(value)
    return found


def worker_command(place: str, ids: Sequence[str]) -> list[str]:
    """The command that executes these runs of a sweep, one after the other, by its folder or address."""
    return [sys.executable, "-m", "experiments.sweep.worker", place, *ids]
