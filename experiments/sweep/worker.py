"""Executes runs of a sweep, one after the other, in one process: `python -m experiments.sweep.worker PLACE ID ...`,
with the folder of the sweep or its address in an object storage.

Every run is the ordinary trainer's, in a folder of its own: what is finished is not done again, and what was
interrupted goes on from its last checkpoint. A run that cannot be done as it is declared leaves a sentence in its
error.txt, and the next one's turn comes. Exit codes: 0 all done, 2 some run cannot be done, 3 told to stop, 4 some run
is being trained by another process.
"""

import hashlib
import os
import pathlib
import signal
import sys
import threading
import time

from accounting import run_files
from accounting.errors import InputError, as_flags
from dpgemma.commands import process
from dpgemma.privacy.keys import Keys
from dpgemma.storage.mirror import HeldError
from experiments.sweep import folder as folder_lib
from experiments.sweep import harvest, stored_folder
from experiments.sweep.divergence import Divergence
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Run

DONE, REFUSED, STOPPED, HELD = 0, 2, 3, 4


class Stopped(Exception):
    """A signal came; the run has been saved at a checkpoint."""


def main(argv: list[str]) -> int:
    settle()
    place, wanted = argv[0], argv[1:]
    try:
        folder, grid = stored_folder.open_existing(place)
    except InputError as error:
        print(f"dpgemma: {as_flags(str(error))}", file=sys.stderr)
        return REFUSED
    share_programs(folder.cache)
    runs = {run.id: run for run in grid.runs}
    code = DONE
    for name in wanted:
        run = runs[name]
        log_to(folder.log_file(run))
        try:
            execute(folder, run)
        except HeldError as error:
            print(f"dpgemma: {as_flags(str(error))}", file=sys.stderr)
            code = max(code, HELD)
        except InputError as error:
            print(f"dpgemma: {as_flags(str(error))}", file=sys.stderr)
            folder.set_error(run, as_flags(" ".join(str(error).split())))
            code = max(code, REFUSED)
        except Stopped:
            return STOPPED
    return code


def settle() -> None:
    """Binds this process to the cores that the launcher gave, and stops it at a checkpoint when the launcher ends.

    To be called before jax is used.
    """
    process.set_deterministic_sums()  # for good: this process is the worker alone
    cores = [int(core) for core in os.environ.get("DPGEMMA_CORES", "").split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)

    def wait_for_end_of_input():
        while os.read(0, 4096):  # not through sys.stdin, whose lock a thread must not hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get("DPGEMMA_ENDS_WITH_INPUT"):
        threading.Thread(target=wait_for_end_of_input, daemon=True).start()


def log_to(path: pathlib.Path) -> None:
    """Standard error, that of libraries included, goes to this file from now on."""
    folder_lib.make_folder(path.parent)
    sys.stderr.flush()
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)


def share_programs(cache: pathlib.Path) -> None:
    """Compiled programs are kept, in this folder or the environment's: runs that differ in noise alone need one between
    them.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def execute(folder: SweepFolder, run: Run) -> None:
    """Trains one run to its end and saves its result, unless that has been done.

    Raises:
      InputError: the run cannot be done as it is declared.
      HeldError: another process trains it, in an object storage.
      Stopped: a signal came; the run may be done all the same.
    """
    with harvest.alone(folder, run):
        folder.fetch([run])
        if folder.is_done(run):
            return
        folder.clear_error(run)
        process.split_cpu(run.config.mesh)
        from dpgemma.commands.terminal import Terminal
        from dpgemma.training.prepare import prepare, prepare_with_public_keys

        start, workdir, divergence = time.monotonic(), folder.workdir(run), Divergence(run.config.steps)
        observers = [Terminal(), *([divergence] if folder.public_data else [])]
        if folder.public_data:
            trainer = prepare_with_public_keys(run.config, reproducible_keys(run), workdir, observers=observers)
        else:
            trainer = prepare(run.config, workdir, epsilon_given=True, observers=observers)
        try:
            divergence.take_up(trainer.run.path / run_files.PRIVATE_METRICS)
            with process.stop_on_signal() as stopped:
                measured = trainer.train(lambda: stopped() or divergence.stopped_at is not None)
            if divergence.stopped_at is not None:
                found = harvest.stopped(trainer.run.path, run, divergence.stopped_at)
            elif measured is None:
                raise Stopped
            else:
                found = harvest.result(trainer.run.path, run)
        finally:
            trainer.run.unlock()
        # A run that went on from a checkpoint took fewer steps in this time.
        last = divergence.stopped_at or run.config.steps
        timed = {"seconds": time.monotonic() - start, "steps_in_seconds": last - trainer.first_step}
        folder.save(run, found | timed)
        if stopped():  # even if the signal came after the last step
            raise Stopped


def reproducible_keys(run: Run) -> Keys:
    """Keys made of the public seed alone, so that a study of public data gives the same table wherever it runs.

    All runs of a seed draw the same batches and hold out the same rows. Such keys are no secret, and the ledger says
    so.
    """
    names = ("sampling", "noise", "holdout", "fingerprint", "ledger")
    return Keys(
        *(
            hashlib.blake2b(f"{name} {run.config.seed}".encode(), digest_size=32, person=b"dpgemma sweep").digest()
            for name in names
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv[1:]))
