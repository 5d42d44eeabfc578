"""Executes runs of a sweep, one after the other, in one process: `python -m experiments.sweep.worker FOLDER ID ...`.

Every run is the ordinary trainer's, in a folder of its own: what is finished is not done again, and what was interrupted goes on from its
last checkpoint. Exit codes: 0 all done, 2 a run cannot be done as it is declared (one sentence on standard error).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time

from accounting.errors import InputError
from experiments.sweep.folder import POINTS, SweepFolder
from experiments.sweep.grid import Run


def main(argv: list[str]) -> int:
    settle()
    folder, wanted = SweepFolder(pathlib.Path(argv[0])), argv[1:]
    share_programs(folder.cache)
    try:
        grid = folder.grid()
        runs = {run.id: run for run in grid.runs}
        for name in wanted:
            execute(folder, runs[name], public_data=grid.public_data)
    except InputError as error:
        print(f"dpgemma: {error}", file=sys.stderr)
        return 2
    return 0


def settle() -> None:
    """Takes the cores that the launcher gave, and ends, at a checkpoint, when the launcher does."""
    cores = [int(core) for core in os.environ.get("DPGEMMA_CORES", "").split(",") if core]
    if cores:
        os.sched_setaffinity(0, cores)

    def wait_for_end_of_input():
        while os.read(0, 4096):  # not through sys.stdin, whose lock a thread must not hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get("DPGEMMA_ENDS_WITH_INPUT"):
        threading.Thread(target=wait_for_end_of_input, daemon=True).start()


def share_programs(cache: pathlib.Path) -> None:
    """Compiled programs are kept in a folder: runs that differ in noise alone need one between them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def execute(folder: SweepFolder, run: Run, *, public_data: bool) -> None:
    """Trains one run to its end and saves its result, unless that has been done.

    Raises:
      InputError: the run cannot be done as it is declared.
    """
    with alone(folder, run):
        if folder.is_done(run):
            return
        from dpgemma.training.prepare import prepare

        start = time.monotonic()
        keys = reproducible_keys(run) if public_data else None
        trainer = prepare(run.config, str(folder.run_folder(run)), epsilon_given=True, keys=keys)
        try:
            bits = trainer.train()
        finally:
            trainer.run.unlock()
        if bits is None:
            raise InputError(f"run {run.id} was told to stop; the same sweep goes on from there")
        result = {
            "model": trainer.start.name,
            "parameters": _parameters(trainer),
            "curve": curve(trainer.run.private / "metrics.jsonl", run.config.steps),
            # Bits per byte are nats per token where a token is a byte.
            "eval_loss": None if math.isnan(bits) else bits * math.log(2),
            "num_units": trainer.data.num_units,
            "seconds": time.monotonic() - start,
        }
        folder.save(run, result)


@contextlib.contextmanager
def alone(folder: SweepFolder, run: Run):
    """Waits until no other process works on the same run: two launchers may have been given it."""
    place = folder.result_file(run).parent
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reproducible_keys(run: Run):
    """Keys made of the public seed alone, so that a study of public data gives the same table wherever it runs.

    All runs of a seed draw the same batches and hold out the same rows. Such keys are no secret: they serve runs that claim no privacy.
    """
    from dpgemma.training.run_directory import Keys

    if math.isfinite(run.config.epsilon):
        raise ValueError("a run with a finite target needs secret keys")
    names = ("sampling", "noise", "holdout", "fingerprint", "ledger")
    return Keys(
        *(hashlib.blake2b(f"{name} {run.config.seed}".encode(), digest_size=32, person=b"dpgemma sweep").digest() for name in names)
    )


def curve(metrics: pathlib.Path, steps: int) -> list[tuple[int, float | None]]:
    """(step, mean training loss of the steps since the point before), at POINTS equal distances; None where no loss was finite."""
    losses = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        if record["units"] and math.isfinite(record["loss"]):  # an empty Poisson draw has no loss
            losses[record["step"]] = record["loss"]
    ends = sorted({math.ceil(steps * i / POINTS) for i in range(1, POINTS + 1)})
    points, first = [], 0
    for end in ends:
        window = [losses[t] for t in range(first, end) if t in losses]
        points.append((end, sum(window) / len(window) if window else None))
        first = end
    return points


def _parameters(trainer) -> int:
    from dpgemma.gemma import decoder

    return decoder.num_parameters(trainer.start.model)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv[1:]))
