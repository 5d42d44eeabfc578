"""A sweep in an object storage, gs:// or s3://, in which several machines may work at once.

The storage has what the folder on a disk has (folder.py), but for logs and compiled programs, which stay with the
machine that made them. Each machine keeps a copy of the small files. A run is trained where it lies, and has a lock
there (storage/mirror.py), which is taken over from a machine that shows no sign of life any more; the run then goes on
from its last checkpoint.

Formal guarantee: a result that is in the storage is never replaced, so machines that finish one run both count the one
that was there first. Of private data, the report in the storage states no sum while a machine that follows this module
may be at work, and no machine takes away a ledger that another has kept there. Tested by
tests/experiments/stored_sweep_test.py::test_the_first_result_of_a_run_stays_and_every_machine_sees_it,
::test_no_sum_is_stated_from_before_the_first_step_on and ::test_no_machine_takes_away_what_another_has_kept.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import secrets
from collections.abc import Iterable

from accounting import run_files
from accounting.errors import InputError
from dpgemma import user_cache
from dpgemma.storage import mirror
from dpgemma.storage.objects import Objects, is_address
from experiments.sweep import folder as folder_lib
from experiments.sweep import privacy
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid, Run


@dataclasses.dataclass(frozen=True)
class StoredFolder(SweepFolder):
    """The copy of a sweep in a storage.

    Attributes:
      objects: the storage's side.
      steps: that runs have taken by their last checkpoint, by id, when they were looked at last.
    """

    objects: Objects
    steps: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def place(self) -> str:
        return self.objects.address

    def workdir(self, run: Run) -> str:
        return f"{self.objects.address}/{self._name(self.run_folder(run))}"

    def steps_taken(self, run: Run) -> int:
        return run.config.steps if self.is_done(run) else self.steps.get(run.id, 0)

    def count_begun(self, grid: Grid) -> int:
        return sum(self.steps_taken(run) > 0 for run in grid.runs)

    def fetch(self, runs: Iterable[Run]) -> None:
        runs = list(runs)
        pending = [run for run in runs if not self.is_done(run)]
        metrics = {run.id: self._name(self.run_folder(run) / run_files.METRICS) for run in pending}
        files = [self.result_file(run) for run in pending] + [self.error_file(run) for run in pending]
        contents = self.objects.read([*map(self._name, files), *metrics.values()])
        for file in files:
            if self._name(file) in contents:
                folder_lib.write_text(file, contents[self._name(file)].decode())
            else:
                file.unlink(missing_ok=True)
        self.steps.update({name: contents.get(file, b"").count(b"\n") for name, file in metrics.items()})
        if not self.public_data:
            self._fetch_ledgers(runs)

    def _fetch_ledgers(self, runs: Iterable[Run]) -> None:
        """The ledgers of all runs that have begun, and those that were kept of earlier ones: what they cost is added
        up here.
        """
        for run in runs:
            place = self._name(self.run_folder(run))
            text = mirror.ledger_of(Objects(f"{self.objects.address}/{place}"))
            if text:
                folder_lib.write_text(self.run_folder(run) / run_files.LEDGER, text)
        self._merge_spent()

    def _merge_spent(self) -> None:
        """Keeps here what other machines have kept, two ledgers of one run that went on otherwise both."""
        for content in self.objects.read(self.objects.names(self._name(self.spent))).values():
            privacy.keep(self, content)

    def publish(self) -> None:
        self._merge_spent()
        shown = [self.report_file, *(file for file in self.results_file.parent.glob("*") if file != self.grid_file)]
        spent = [path for path in self.spent.rglob("*") if path.is_file()]
        for file in [*(file for file in shown if file.is_file() and file.name != "lock"), *spent]:
            self.objects.write(self._name(file), file.read_bytes())

    def save(self, run: Run, result: dict) -> None:
        name = self._name(self.result_file(run))
        self.objects.create(name, run_files.dumps(result).encode())
        folder_lib.write_text(self.result_file(run), self.objects.read([name])[name].decode())

    def set_error(self, run: Run, sentence: str) -> None:
        super().set_error(run, sentence)
        self.objects.write(self._name(self.error_file(run)), sentence.encode())

    def clear_error(self, run: Run) -> None:
        super().clear_error(run)
        self.objects.delete([self._name(self.error_file(run))])

    @contextlib.contextmanager
    def locked(self):
        """Nothing is locked: every run has a lock of its own."""
        yield

    def _name(self, file: pathlib.Path) -> str:
        return file.relative_to(self.path).as_posix()


def look(place: str, grid: Grid) -> tuple[SweepFolder, Grid]:
    """As folder.look, of a folder or of an address."""
    if not is_address(place):
        return folder_lib.look(pathlib.Path(place), grid)
    objects, path = _copy_of(place)
    folder, everything = folder_lib.look(path, grid)
    return StoredFolder(path, folder.public_data, objects), everything


def create(place: str, grid: Grid) -> tuple[SweepFolder, Grid]:
    """As folder.create, of a folder or of an address."""
    if not is_address(place):
        return folder_lib.create(pathlib.Path(place), grid)
    objects, path = _copy_of(place)
    folder, everything = folder_lib.create(path, grid)
    content = folder.grid_file.read_bytes()
    if objects.read([folder.grid_file.name]).get(folder.grid_file.name) != content:
        objects.write(folder.grid_file.name, content)
    return StoredFolder(path, folder.public_data, objects), everything


def open_existing(place: str) -> tuple[SweepFolder, Grid]:
    """The sweep in a folder or at an address, and all its runs.

    Raises:
      InputError: there is none.
    """
    objects, path = _copy_of(place) if is_address(place) else (None, pathlib.Path(place))
    grid = folder_lib.stored(path)
    if objects is None:
        return SweepFolder(path, grid.public_data), grid
    return StoredFolder(path, grid.public_data, objects), grid


def _copy_of(address: str) -> tuple[Objects, pathlib.Path]:
    """The storage's side of a sweep, and this machine's folder for it, with its grid.

    Raises:
      InputError: the address holds something else, or cannot be used.
    """
    objects = Objects(address)
    path = user_cache.folder() / "sweeps" / hashlib.sha256(objects.address.encode()).hexdigest()[:16]
    content = objects.read(["grid.json"]).get("grid.json")
    if content is None and objects.names():
        raise InputError(f"{address} is neither empty nor the folder of a sweep: choose another `workdir`")
    if content is None and (path / "grid.json").is_file():
        # What is left of a sweep that was removed from there is no part of a new one.
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if content is not None:
        folder_lib.write_text(path / "grid.json", content.decode())
    return objects, path
