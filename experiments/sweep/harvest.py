"""From a trainer's finished folder to a run's result: whoever trained it, a worker of the sweep or a `dpgemma train` of
its own.
"""

import contextlib
import fcntl
import json
import math
import pathlib

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import chain as ledger
from accounting.ledger import executed as executed_lib
from dpgemma.choices import AUTO
from dpgemma.training.settings import OPERATIONAL
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Run

# Points of a run's loss curve.
POINTS = 32


@contextlib.contextmanager
def alone(folder: SweepFolder, run: Run, *, wait: bool = True):
    """Keeps other processes away from a run: two launchers may have been given it.

    Yields True if the lock was acquired.

    Args:
      wait: until nobody else works on it.
    """
    place = folder.run_folder(run).parent
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def save_finished(folder: SweepFolder, runs: list[Run]) -> None:
    """Saves the results of those runs whose training has ended without having been noted; the others are left as they
    are.
    """
    for run in runs:
        if not is_finished(folder, run):
            continue
        with alone(folder, run, wait=False) as free:
            if free and not folder.is_done(run):
                with contextlib.suppress(InputError):  # the worker that will be given it says what is wrong
                    folder.save(run, result(folder.run_folder(run), run))


def is_finished(folder: SweepFolder, run: Run) -> bool:
    """Whether the trainer's folder of a run holds all steps of it, by its ledger."""
    path = folder.run_folder(run) / run_files.LEDGER
    try:
        return path.is_file() and executed_lib.of(ledger.read(path)).finished
    except InputError:
        return False


def result(place: pathlib.Path, run: Run) -> dict:
    """The numbers of a run that is finished.

    Args:
      place: the trainer's folder of it.

    Raises:
      InputError: the folder is that of other settings.
    """
    recorded = json.loads((place / run_files.CONFIG).read_text())
    given = {
        name: value
        for name, value in run.config.as_dict().items()
        if name not in OPERATIONAL and value not in (None, AUTO)
    }
    differing = [name for name, value in given.items() if recorded.get(name) != ("inf" if value == math.inf else value)]
    if differing:
        raise InputError(
            f"{place} was trained with another {', '.join(differing)}: rename it, and the sweep trains the run again"
        )
    facts = executed_lib.of(ledger.read(place / run_files.LEDGER))
    bits = json.loads((place / run_files.HELD_OUT).read_text().splitlines()[-1]).get("bits_per_byte", math.nan)
    return {
        "model": facts.declared["model"],
        "parameters": facts.declared["parameters"],
        "curve": curve(place / run_files.PRIVATE_METRICS, run.config.steps),
        # In nats per byte; of the byte tokenizer those are nats per token, as the curve is.
        "eval_loss": None if math.isnan(bits) else bits * math.log(2),
        "num_units": facts.planned.num_units,
    }


def stopped(place: pathlib.Path, run: Run, steps: int) -> dict:
    """The numbers of a run that was stopped after so many steps: losses that are none from there on."""
    facts = executed_lib.of(ledger.read(place / run_files.LEDGER))
    taken = {step: loss for step, loss in losses(place / run_files.PRIVATE_METRICS).items() if step < steps}
    return {
        "model": facts.declared["model"],
        "parameters": facts.declared["parameters"],
        "curve": points(taken, run.config.steps),
        "eval_loss": None,
        "num_units": facts.planned.num_units,
        "stopped_at": steps,
    }


def curve(metrics: pathlib.Path, steps: int) -> list[tuple[int, float | None]]:
    """(step, mean training loss of the steps since the point before), at POINTS equal distances; None where no loss was
    finite.
    """
    return points(losses(metrics), steps)


def losses(metrics: pathlib.Path) -> dict[int, float]:
    """The mean loss of each step's units, by step."""
    found = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        if record["units"]:  # an empty Poisson draw has no loss
            found[record["step"]] = record["loss"]
    return found


def ends(steps: int) -> list[int]:
    """The steps after which a curve has its points."""
    return sorted({math.ceil(steps * i / POINTS) for i in range(1, POINTS + 1)})


def points(losses: dict[int, float], steps: int) -> list[tuple[int, float | None]]:
    """As `curve`, of losses by step."""
    found, first = [], 0
    for end in ends(steps):
        window = [losses[t] for t in range(first, end) if math.isfinite(losses.get(t, math.nan))]
        found.append((end, sum(window) / len(window) if window else None))
        first = end
    return found
