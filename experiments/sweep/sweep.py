"""Runs a grid to its end: what is done stays done, what died is tried again, and the table is made of what the folder
holds.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Sequence

from experiments.sweep import harvest, launchers, privacy, progress, results, worker
from experiments.sweep.checks import operations
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid, Run

_PAUSE = 20.0  # seconds until runs are tried again that others train


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the runs that a sweep was asked for.

    Attributes:
      table: of all finished runs, or None.
      failed: of each run that was asked for and is not done, the sentence that says why.
    """

    table: results.Table | None
    failed: dict[str, str]


def run(
    folder: SweepFolder,
    grid: Grid,
    everything: Grid,
    launcher: launchers.Launcher,
    *,
    retries: int = 2,
    runs_per_process: int = 8,
) -> Outcome:
    """Executes every run of a grid that is not done. A folder on a disk must be locked.

    Where the folder lies in an object storage, other machines may be at work in it too: there each run has a lock.

    Formal guarantee: a run that is done is not executed again, however often the sweep is killed and started, because
    only its result file, which appears whole or not at all, says that it is done; what was in flight goes on from its
    last checkpoint. Tested by tests/experiments/sweep_test.py::test_a_killed_sweep_repeats_nothing_that_was_done.

    Args:
      everything: all runs of the folder; those that the grid does not name any more belong to the table and to the
        report.
      retries: how often in a row a run may die without having got further than ever before.
      runs_per_process: most runs that one process executes one after the other; programs are compiled once for those
        that share them.
    """
    folder.fetch(everything.runs)
    harvest.save_finished(folder, folder.pending(grid))
    for pending in folder.pending(grid):
        folder.clear_error(pending)  # it may be possible by now
    if folder.pending(grid):
        privacy.write_unfinished(folder, everything)
        folder.publish()  # before a step is taken, so that no report in a storage says too little
    try:
        with progress.Display(folder, grid):
            _rounds(folder, grid, everything, launcher, retries, runs_per_process)
    finally:
        folder.fetch(everything.runs)
        table = folder.write_table(everything)
        if folder.is_shared and any(folder.error(run) is None for run in folder.pending(everything)):
            privacy.write_unfinished(folder, everything)  # others may be at work: a sum would soon say too little
        else:
            privacy.write(folder, everything)
        folder.publish()
    return Outcome(table, {run.id: _why(folder, run, retries) for run in folder.pending(grid)})


def _rounds(folder: SweepFolder, grid: Grid, everything: Grid, launcher, retries: int, runs_per_process: int) -> None:
    tries, furthest = collections.Counter(), collections.Counter()
    size = runs_per_process
    while pending := [run for run in folder.pending(grid) if folder.error(run) is None and tries[run.id] <= retries]:
        furthest.update({run.id: max(0, folder.steps_taken(run) - furthest[run.id]) for run in pending})
        jobs = batches(pending, launcher.slots, size)
        commands = [launchers.worker_command(folder.place, [run.id for run in job]) for job in jobs]
        held = set()
        with contextlib.closing(launcher.run(commands)) as ended:
            for number, code, message in ended:
                if code == worker.HELD:
                    held.add(number)
                elif code not in (worker.DONE, worker.REFUSED, worker.STOPPED) or message:
                    progress.note(
                        f"a process ended with {code} ({message or 'no message'}); what it left undone is tried again"
                    )
                folder.fetch(jobs[number])
                folder.write_table(everything)
        folder.fetch(pending)
        for number, job in enumerate(jobs):
            # A process works in order: its first unfinished run is the one it died of, and only its tries are counted.
            left = [run for run in job if not folder.is_done(run) and folder.error(run) is None]
            for run in left[:1] if number not in held else ():
                tries[run.id] = 0 if folder.steps_taken(run) > furthest[run.id] else tries[run.id] + 1
        if len(held) == len(jobs):
            time.sleep(_PAUSE)  # other machines train all that is left
        size = 1  # so that a run that kills its process takes no other with it


def _why(folder: SweepFolder, run: Run, retries: int) -> str:
    """Why a run is not done."""
    if error := folder.error(run):
        return error
    log = folder.log_file(run)
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1] if log.is_file() else ""
    return f"its process died {retries + 1} times in a row; {log} ends with: {last or 'nothing'}"


def batches(pending: Sequence[Run], slots: int, most: int) -> list[list[Run]]:
    """Returns the runs of each process. Runs that share a compiled program stay together; held-out runs come last, and
    costly jobs first.
    """
    size = max(1, min(most, len(pending) // (2 * slots)))
    groups: dict[tuple, list[Run]] = {}
    for run in pending:
        c = run.config
        alike = (run.held_out, c.model, c.batch_size, c.sequence_length, c.learning_rate, c.steps)
        groups.setdefault(alike, []).append(run)
    jobs = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(jobs, key=lambda job: (job[0].held_out, -sum(map(operations, job))))
