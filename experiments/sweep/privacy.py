"""What a whole sweep costs in privacy: every run counts, chosen or not.

Formal guarantee: for private data, the reported epsilon is that of all executed steps of all runs together, finished or
not; so it holds for whoever sees every checkpoint of every run, and for every choice made by looking at nothing else of
the data. A run whose folder was deleted counts as far as it had come when the sweep last began or ended. The losses
that a law is fitted to are raw: they lie in private/, and a choice made by them is not covered. Tested by
tests/experiments/sweep_test.py::test_pitfall_25_a_sweep_of_private_data_adds_up_all_its_runs and
tests/experiments/spending_test.py.
"""

import json
import math
import pathlib

from accounting import rounding, run_files, tuning
from accounting.ledger import chain as ledger
from accounting.ledger import executed as executed_lib
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid

PUBLIC = (
    "This sweep ran on data that its grid declares to be public. Its runs claim no privacy, its table shows raw"
    " training losses, and nothing in it costs the privacy of other data to which its law is applied."
)
_RAW = (
    " The training losses in private/results.csv are raw and NOT covered: settings chosen by them may reveal something"
    " about single units; choose by models and public data alone, or run the sweep on public data."
)
_NOTHING = "No step of this sweep has been executed: nothing has been spent."
_UNFINISHED = (
    "This sweep is at work, or was killed: what its runs cost together has not been added up. The same dpgemma sweep"
    " command goes on, and adds it up in the end."
)


def summary(folder: SweepFolder, grid: Grid) -> dict:
    """The content of report.json."""
    if grid.public_data:
        return _report(grid, folder.count_begun(grid), PUBLIC)
    keep_ledgers(folder, grid)
    executed = [place for place in _spent(folder) if executed_lib.of(ledger.read(place / run_files.LEDGER)).has_spent]
    if not executed:
        return _report(grid, 0, _NOTHING)
    found = tuning.runs(executed)
    delta = max(run.delta for run in found.values())
    epsilon = tuning.accountant(found).upper(delta)
    statement = tuning.statement(found, epsilon, delta) + (_RAW if math.isfinite(epsilon) else "")
    runs = len({run.declared["run_id"] for run in found.values()})
    return _report(grid, runs, statement, rounding.round_up(epsilon), delta)


def write(folder: SweepFolder, grid: Grid) -> None:
    """Writes the report, and keeps the ledgers that it adds up."""
    run_files.write(folder.report_file, run_files.dumps(summary(folder, grid)))


def write_unfinished(folder: SweepFolder, grid: Grid) -> None:
    """Replaces the report of an earlier state before further runs are executed, so that no report says too little."""
    keep_ledgers(folder, grid)
    statement = PUBLIC if grid.public_data else _UNFINISHED
    run_files.write(folder.report_file, run_files.dumps(_report(grid, folder.count_begun(grid), statement)))


def keep_ledgers(folder: SweepFolder, grid: Grid) -> None:
    """Copies the ledger of every run that has begun: what was spent stays spent when the run's folder is deleted.

    A copy is replaced by a longer one that begins as it does, and by nothing else: a run that was put back to an
    earlier state and went on otherwise has two.
    """
    for place in [] if grid.public_data else folder.begun():
        keep(folder, (place / run_files.LEDGER).read_bytes())


def keep(folder: SweepFolder, text: bytes) -> None:
    """Keeps one ledger, unless one that goes on from it is kept."""
    whole = text[: text.rfind(b"\n") + 1]  # a process that was killed may have left half a line
    run_id = json.loads(whole.partition(b"\n")[0])["run_id"]
    number = 0
    while (kept := folder.spent / f"{run_id}.{number}" / run_files.LEDGER).is_file():
        known = kept.read_bytes()
        if known.startswith(whole) or whole.startswith(known):
            break
        number += 1
    if kept.is_file() and len(kept.read_bytes()) >= len(whole):
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    run_files.write(kept, whole.decode())


def _spent(folder: SweepFolder) -> list[pathlib.Path]:
    """Folders with the ledgers of all runs that have begun, whether or not they are still there."""
    return sorted(path.parent for path in folder.spent.glob(f"*/{run_files.LEDGER}"))


def _report(grid: Grid, runs: int, statement: str, epsilon: float | None = None, delta: float | None = None) -> dict:
    return {"public_data": grid.public_data, "runs": runs, "epsilon": epsilon, "delta": delta, "statement": statement}
