"""A sweep's folder: what was asked for, and of every run what is done. The folder is the whole state: to go on is to look into it.

grid.json            every run's settings, written before the first one starts
runs/ID/result.json  one finished run's numbers, written last, in one step
runs/ID/run/         the trainer's own folder of that run
cache/               compiled programs that runs share
results.csv          the table of all finished runs (in private/ where the data are not public)
report.json          what the sweep cost in privacy, or that it ran on public data
"""

import dataclasses
import json
import math
import pathlib
import shutil

from accounting import report
from accounting.errors import InputError
from dpgemma.training.config import TrainConfig
from experiments.sweep import results
from experiments.sweep.grid import Grid, Run

# Points of a run's loss curve.
POINTS = 32


class SweepFolder:
    """Paths of a sweep that exists, and its runs."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.grid_file = path / "grid.json"
        self.cache = path / "cache"
        self.report_file = path / "report.json"
        self.logs = path / "logs"

    def grid(self) -> Grid:
        """The runs that were asked for.

        Raises:
          InputError: the folder is no sweep's.
        """
        try:
            stored = json.loads(self.grid_file.read_text())
        except FileNotFoundError:
            raise InputError(f"{self.path} is no sweep's folder: it has no grid.json") from None
        decode = lambda settings: {name: math.inf if value == "inf" else value for name, value in settings.items()}
        runs = tuple(Run(TrainConfig(**decode(run["settings"])), run["held_out"]) for run in stored["runs"])
        return Grid(runs, stored["public_data"])

    def run_folder(self, run: Run) -> pathlib.Path:
        return self.path / "runs" / run.id / "run"

    def result_file(self, run: Run) -> pathlib.Path:
        return self.path / "runs" / run.id / "result.json"

    def is_done(self, run: Run) -> bool:
        return self.result_file(run).is_file()

    def pending(self, grid: Grid) -> list[Run]:
        return [run for run in grid.runs if not self.is_done(run)]

    def steps_taken(self, run: Run) -> int:
        """Steps that a run has begun, by its ledger; for a display, so not to the last one."""
        if self.is_done(run):
            return run.config.steps
        try:
            with open(self.run_folder(run) / "metrics.jsonl", "rb") as file:
                return sum(1 for _ in file)
        except OSError:
            return 0

    def save(self, run: Run, result: dict) -> None:
        """Marks a run as done, and drops what only an unfinished one needs."""
        report.write(self.result_file(run), report.dumps(result))
        shutil.rmtree(self.run_folder(run) / "checkpoints", ignore_errors=True)

    def result(self, run: Run) -> dict:
        return json.loads(self.result_file(run).read_text())

    def table(self, grid: Grid) -> results.Table | None:
        """All finished runs, in the grid's order; None where there is none."""
        records = [row for run in grid.runs if self.is_done(run) for row in rows(run, self.result(run))]
        return results.of_records(records) if records else None

    def results_file(self, grid: Grid) -> pathlib.Path:
        """Where the table lies: raw losses of private data are nobody else's to see."""
        if grid.public_data:
            return self.path / "results.csv"
        private = self.path / "private"
        private.mkdir(mode=0o700, exist_ok=True)
        return private / "results.csv"


def create(path: pathlib.Path, grid: Grid) -> SweepFolder:
    """The folder of a grid. A folder that exists may get further runs, and loses none.

    Raises:
      InputError: the folder holds something else, or a sweep of other data in the public's eye.
    """
    folder = SweepFolder(path)
    if folder.grid_file.is_file():
        known = folder.grid()
        if known.public_data != grid.public_data:
            raise InputError(f"{path} holds a sweep that says public_data = {str(known.public_data).lower()}: choose another --workdir")
        ids = {run.id for run in grid.runs}
        # Runs that the file does not name any more were executed all the same, and stay in the report.
        grid = dataclasses.replace(grid, runs=(*grid.runs, *(run for run in known.runs if run.id not in ids)))
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is neither empty nor the folder of a sweep: choose another --workdir")
    path.mkdir(parents=True, exist_ok=True)
    stored = [{"id": run.id, "held_out": run.held_out, "settings": run.config.as_dict()} for run in grid.runs]
    report.write(folder.grid_file, report.dumps({"public_data": grid.public_data, "runs": stored}))
    return folder


def rows(run: Run, result: dict) -> list[dict]:
    """The table's rows of one finished run, one for each point of its curve."""
    c = run.config
    tokens = c.batch_size * c.sequence_length
    common = {
        results.MODEL: result["model"], results.LEARNING_RATE: c.learning_rate, results.RATIO: run.noise_batch_ratio,
        results.PARAMETERS: result["parameters"], results.BATCH: c.batch_size, results.LENGTH: c.sequence_length, results.SEED: c.seed,
        results.HELD_OUT: float(run.held_out), results.CONFIG: run.id,
    }  # fmt: skip
    table = []
    for step, loss in result["curve"]:
        seen = {results.TOKENS: tokens * step, results.FLOPS: 6.0 * result["parameters"] * tokens * step}
        table.append({**common, results.ITERATIONS: step, results.LOSS: math.nan if loss is None else loss, **seen})
    table[-1][results.EVAL_LOSS] = math.nan if result["eval_loss"] is None else result["eval_loss"]
    return table
