"""A sweep's folder: what was asked for, and of every run what is done. The folder is the whole state: to go on is to
look into it.

grid.json            every run's settings, written before the first one starts
runs/ID/result.json  one finished run's numbers, written last, in one step (in runs/ID/private/ for private data)
runs/ID/run/         the trainer's own folder of that run
runs/ID/log.txt      what the processes that worked on it wrote to standard error
runs/ID/error.txt    why it could not be done when it was tried last
cache/               compiled programs that runs share
results.csv          the table of all finished runs (in private/ where the data are not public)
report.json          what the sweep cost in privacy, or that it ran on public data
spent/RUN_ID.N/      a copy of the ledger of every run that has begun, so that deleting a run does not hide its cost
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import pathlib
import shutil
from collections.abc import Iterable

from accounting import run_files
from accounting.errors import InputError
from dpgemma.training.settings import Settings
from experiments.sweep import results
from experiments.sweep.grid import Grid, Run


@dataclasses.dataclass(frozen=True)
class SweepFolder:
    """Paths of a sweep, and what they hold. Raw losses of private data are nobody else's to see, and lie in folders of
    mode 0700.
    """

    path: pathlib.Path
    public_data: bool

    @property
    def grid_file(self) -> pathlib.Path:
        return self.path / "grid.json"

    @property
    def cache(self) -> pathlib.Path:
        return self.path / "cache"

    @property
    def logs(self) -> pathlib.Path:
        return self.path / "logs"

    @property
    def spent(self) -> pathlib.Path:
        return self.path / "spent"

    @property
    def report_file(self) -> pathlib.Path:
        return self.path / run_files.REPORT

    @property
    def results_file(self) -> pathlib.Path:
        return self._raw(self.path) / "results.csv"

    def run_folder(self, run: Run) -> pathlib.Path:
        return self.path / "runs" / run.id / "run"

    def result_file(self, run: Run) -> pathlib.Path:
        return self._raw(self.path / "runs" / run.id) / "result.json"

    def log_file(self, run: Run) -> pathlib.Path:
        return self._raw(self.path / "runs" / run.id) / "log.txt"

    def error_file(self, run: Run) -> pathlib.Path:
        return self._raw(self.path / "runs" / run.id) / "error.txt"

    @property
    def is_shared(self) -> bool:
        """Whether other machines may be at work in it."""
        return False

    @property
    def place(self) -> str:
        """By which other processes are told of the folder."""
        return str(self.path.absolute())

    def workdir(self, run: Run) -> str:
        """Where the trainer's folder of a run is, or will be."""
        return str(self.run_folder(run))

    def fetch(self, runs: Iterable[Run]) -> None:
        """Learns what other machines have done of these runs since, where the folder is not all that there is."""

    def publish(self) -> None:
        """Shows the table, the report and the law to other machines, where they do not see the folder."""

    def _raw(self, place: pathlib.Path) -> pathlib.Path:
        return place if self.public_data else place / run_files.PRIVATE

    def is_done(self, run: Run) -> bool:
        return self.result_file(run).is_file()

    def pending(self, grid: Grid) -> list[Run]:
        return [run for run in grid.runs if not self.is_done(run)]

    def steps_taken(self, run: Run) -> int:
        """Steps that a run has taken, by its metrics; for a display, so not to the last one."""
        if self.is_done(run):
            return run.config.steps
        try:
            with open(self.run_folder(run) / run_files.METRICS, "rb") as file:
                return sum(1 for _ in file)
        except OSError:
            return 0

    def begun(self) -> list[pathlib.Path]:
        """Folders of the runs that have begun, whatever the grid says by now, and whatever they were renamed to."""
        return sorted(path.parent for path in self.path.glob(f"runs/*/*/{run_files.LEDGER}"))

    def count_begun(self, grid: Grid) -> int:
        """Runs that have begun."""
        return len(self.begun())

    def error(self, run: Run) -> str | None:
        """Why a run could not be done when it was tried last."""
        with contextlib.suppress(FileNotFoundError):
            return self.error_file(run).read_text()
        return None

    def set_error(self, run: Run, sentence: str) -> None:
        """Says why a run cannot be done."""
        write_text(self.error_file(run), sentence)

    def clear_error(self, run: Run) -> None:
        self.error_file(run).unlink(missing_ok=True)

    def save(self, run: Run, result: dict) -> None:
        """Marks a run as done, and drops all checkpoints but the last: the model that was trained, without which no
        audit is whole.
        """
        write_text(self.result_file(run), run_files.dumps(result))
        checkpoints = self.run_folder(run) / run_files.CHECKPOINTS
        steps = (
            sorted(int(place.name) for place in checkpoints.iterdir() if place.name.isdecimal())
            if checkpoints.is_dir()
            else []
        )
        for step in steps[:-1]:
            shutil.rmtree(checkpoints / str(step), ignore_errors=True)

    def result(self, run: Run) -> dict:
        return json.loads(self.result_file(run).read_text())

    def table(self, grid: Grid) -> results.Table | None:
        """All finished runs, in the grid's order; None where there is none."""
        records = [row for run in grid.runs if self.is_done(run) for row in rows(run, self.result(run))]
        return results.of_records(records) if records else None

    def write_table(self, grid: Grid) -> results.Table | None:
        """Writes the table of what is done so far."""
        table = self.table(grid)
        if table is not None:
            make_folder(self.results_file.parent)
            results.write(self.results_file, table)
        return table

    @contextlib.contextmanager
    def locked(self):
        """Holds the sweep for this process.

        Raises:
          InputError: another process holds it.
        """
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another sweep is at work in {self.path}: wait for it, or choose another `workdir`"
                ) from None
            yield


def make_folder(place: pathlib.Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if place.name == run_files.PRIVATE:
        place.chmod(0o700)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in one step, in a folder that is made for it."""
    make_folder(path.parent)
    run_files.write(path, text)


def stored(path: pathlib.Path) -> Grid:
    """The runs that were asked for in a sweep's folder.

    Raises:
      InputError: the folder is no sweep's, or its grid.json is damaged.
    """
    try:
        content = json.loads((path / "grid.json").read_text())

        def decode(settings):
            return {name: math.inf if value == "inf" else value for name, value in settings.items()}

        runs = {run["id"]: Run(Settings(**decode(run["settings"])), run["held_out"]) for run in content["runs"]}
        if any(name != run.id for name, run in runs.items()):
            raise ValueError("settings that this version does not know, or has more of")
        return Grid(tuple(runs.values()), content["public_data"])
    except FileNotFoundError:
        raise InputError(f"{path} is no sweep's folder: it has no grid.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}/grid.json is damaged, or of another version: choose another `workdir`") from None


def look(path: pathlib.Path, grid: Grid) -> tuple[SweepFolder, Grid]:
    """The folder that a grid would have, and all its runs, with those that earlier grids asked for. Nothing is written.

    Raises:
      InputError: the folder holds something else, or a sweep that says otherwise who may see its data.
    """
    if (path / "grid.json").is_file():
        known = stored(path)
        if known.public_data != grid.public_data:
            raise InputError(
                f"{path} holds a sweep that says public_data = {str(known.public_data).lower()}: choose another"
                " `workdir`"
            )
        ids = {run.id for run in grid.runs}
        # Runs that the file does not name any more stay in the table, and in the report if they were executed.
        grid = dataclasses.replace(grid, runs=(*grid.runs, *(run for run in known.runs if run.id not in ids)))
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is neither empty nor the folder of a sweep: choose another `workdir`")
    return SweepFolder(path, grid.public_data), grid


def create(path: pathlib.Path, grid: Grid) -> tuple[SweepFolder, Grid]:
    """The folder of a grid, and all its runs, as `look` finds them. A folder that exists may get further runs, and
    loses none.
    """
    folder, everything = look(path, grid)
    runs = [{"id": run.id, "held_out": run.held_out, "settings": run.config.as_dict()} for run in everything.runs]
    text = run_files.dumps({"public_data": grid.public_data, "runs": runs})
    if not folder.grid_file.is_file() or folder.grid_file.read_text() != text:
        write_text(folder.grid_file, text)
    return folder, everything


def rows(run: Run, result: dict) -> list[dict]:
    """The table's rows of one finished run, one for each point of its curve."""
    from dpgemma.training.data import tokenizer_of

    c = run.config
    tokens = c.batch_size * c.sequence_length
    common = {
        results.MODEL: result["model"], results.LEARNING_RATE: c.learning_rate, results.RATIO: run.noise_batch_ratio,
        results.PARAMETERS: result["parameters"], results.BATCH: c.batch_size, results.LENGTH: c.sequence_length,
        results.SEED: c.seed, results.SCHEDULE: c.schedule, results.TOKENIZER: tokenizer_of(c), results.DATA: c.data,
        results.HELD_OUT: float(run.held_out), results.CONFIG: run.id,
    }  # fmt: skip
    table, before = [], 0
    for step, loss in result["curve"]:
        seen = {
            results.TOKENS: tokens * step, results.FLOPS: 6.0 * result["parameters"] * tokens * step,
            results.WINDOW: step - before,
        }  # fmt: skip
        before = step
        table.append({**common, results.ITERATIONS: step, results.LOSS: math.nan if loss is None else loss, **seen})
    table[-1][results.EVAL_LOSS] = math.nan if result["eval_loss"] is None else result["eval_loss"]
    return table
