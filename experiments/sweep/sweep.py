"""Runs a grid to its end: what is done stays done, what died is tried again, and the table is made of what the folder holds."""

import dataclasses
from collections.abc import Sequence

from accounting.errors import InputError
from experiments.sweep import launchers, privacy, progress, results
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid, Run


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    table: of all finished runs, or None.
    failed: runs that cannot be done, with the sentence of each that says why.
    """

    table: results.Table | None
    failed: dict[str, str]


def run(folder: SweepFolder, grid: Grid, launcher: launchers.Launcher, *, retries: int = 2, runs_per_process: int = 8) -> Outcome:
    """Executes every run that is not done.

    Formal guarantee: a run that is done is not executed again, however often the sweep is killed and started, because only its result
    file, which appears whole or not at all, says that it is done; what was in flight goes on from its last checkpoint. Tested by
    tests/experiments/sweep_test.py::test_a_killed_sweep_repeats_nothing_that_was_done.

    Args:
      retries: how often a run whose process died without a reason of its own is tried again.
      runs_per_process: most runs that one process executes one after the other; programs are compiled once for those that share them.
    """
    failed: dict[str, str] = {}
    with progress.Display(folder, grid, launcher.slots):
        for _ in range(retries + 1):
            pending = [run for run in folder.pending(grid) if run.id not in failed]
            if not pending:
                break
            _round(folder, pending, launcher, runs_per_process, failed)
            save(folder, grid)
    for run in folder.pending(grid):
        failed.setdefault(run.id, f"its process died {retries + 1} times; its log is under {folder.run_folder(run)}")
    return Outcome(save(folder, grid), failed)


def _round(folder: SweepFolder, pending: Sequence[Run], launcher, runs_per_process: int, failed: dict[str, str]) -> None:
    jobs = batches(pending, launcher.slots, runs_per_process)
    commands = [launchers.worker_command(folder.path, [run.id for run in job]) for job in jobs]
    for number, code, message in launcher.run(commands):
        if code == 2:
            # The worker stops at the run that cannot be done: those behind it are for the next round.
            culprit = next((run for run in jobs[number] if not folder.is_done(run)), None)
            if culprit is not None and "told to stop" not in message:
                failed[culprit.id] = message.removeprefix("dpgemma: ")
        elif code not in (0,):
            progress.note(f"a process ended with {code} ({message or 'no message'}); what it left undone is tried again")


def batches(pending: Sequence[Run], slots: int, most: int) -> list[list[Run]]:
    """Runs by the process: programs in common together; what the law is fitted to before what tests it, the dear ones first."""
    size = max(1, min(most, len(pending) // (2 * slots)))
    groups: dict[tuple, list[Run]] = {}
    for run in pending:
        alike = (
            run.held_out,
            run.config.model,
            run.config.batch_size,
            run.config.sequence_length,
            run.config.learning_rate,
            run.config.steps,
        )
        groups.setdefault(alike, []).append(run)
    jobs = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(jobs, key=lambda job: (job[0].held_out, -sum(map(operations, job))))


def operations(run: Run) -> float:
    """6 M B S T: floating-point operations of a run by the rule that scaling laws are written in."""
    c = run.config
    return 6.0 * parameters(c.model or "tiny") * c.batch_size * c.sequence_length * c.steps


def parameters(model: str) -> int:
    """Parameters of a preset.

    Raises:
      InputError: it is none.
    """
    from dpgemma.gemma import decoder
    from dpgemma.gemma.presets import PRESETS

    if model not in PRESETS:
        raise InputError(f"model {model!r} is no preset: choose one of {', '.join(PRESETS)}")
    return decoder.num_parameters(PRESETS[model])


def save(folder: SweepFolder, grid: Grid) -> results.Table | None:
    """Writes the table and the privacy report of what is done so far."""
    table = folder.table(grid)
    if table is not None:
        results.write(folder.results_file(grid), table)
        privacy.write(folder, grid)
    return table
