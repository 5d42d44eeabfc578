"""Sweeps in an object storage: a server of S3's interface on this computer, the client library that users have."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from accounting.errors import InputError
from dpgemma.storage.objects import Objects
from experiments.sweep import grid as grid_lib
from experiments.sweep import privacy, stored_folder, sweep
from tests import object_storage
from tests.experiments.sweeps import GRID, toml
from tests.training.runs import COMMAND, wait_for

RESULT = {"model": "ladder_20k", "parameters": 20184, "curve": [[8, 3.0]], "eval_loss": 3.0, "num_units": 9}


@pytest.fixture(scope="module")
def server():
    with object_storage.served() as running:
        yield running


@pytest.fixture
def address(server, tmp_path, monkeypatch):
    for name, value in object_storage.machine(server, tmp_path / "here").items():
        monkeypatch.setenv(name, value)
    return f"s3://{object_storage.new_bucket()}/sweeps/one"


def two_machines(address, tmp_path, monkeypatch, grid):
    """The folders of two machines for one sweep."""
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        yield stored_folder.create(address, grid)[0]


@pytest.fixture
def grid(notes, tmp_path):
    return grid_lib.read(toml(tmp_path / "grid.toml", notes, GRID))


def test_the_first_result_of_a_run_stays_and_every_machine_sees_it(address, grid, tmp_path, monkeypatch):
    one, other = two_machines(address, tmp_path, monkeypatch, grid)
    run = grid.runs[0]
    one.save(run, RESULT | {"seconds": 1.0})
    assert not other.is_done(run)
    other.save(run, RESULT | {"seconds": 2.0})
    assert one.result(run)["seconds"] == other.result(run)["seconds"] == 1.0
    assert [each.id for each in other.pending(grid)] == [each.id for each in grid.runs[1:]]
    assert one.path != other.path and other.place == address


def test_errors_and_progress_are_seen_by_every_machine_until_they_are_gone(address, grid, tmp_path, monkeypatch):
    one, other = two_machines(address, tmp_path, monkeypatch, grid)
    first, second = grid.runs[:2]
    one.set_error(first, "it cannot be done")
    Objects(address).write(f"runs/{second.id}/run/metrics.jsonl", b"{}\n{}\n{}\n")
    other.fetch(grid.runs)
    assert other.error(first) == "it cannot be done" and other.error(second) is None
    assert other.steps_taken(second) == 3 and other.count_begun(grid) == 1
    other.clear_error(first)
    one.fetch(grid.runs)
    assert one.error(first) is None


def test_a_table_of_two_machines_is_that_of_one(address, grid, tmp_path, monkeypatch):
    one, other = two_machines(address, tmp_path, monkeypatch, grid)
    for number, run in enumerate(grid.runs):
        (one, other)[number % 2].save(run, RESULT | {"seconds": 1.0})
    for folder in (one, other):
        folder.fetch(grid.runs)
        folder.write_table(grid)
        folder.publish()
    assert one.results_file.read_bytes() == other.results_file.read_bytes()
    assert Objects(address).read(["results.csv"])["results.csv"] == one.results_file.read_bytes()


def test_what_is_no_sweep_is_refused_and_what_was_removed_is_begun_anew(address, grid):
    with pytest.raises(InputError, match="is no sweep's folder"):
        stored_folder.open_existing(address)
    folder, _ = stored_folder.create(address, grid)
    folder.save(grid.runs[0], RESULT)
    assert stored_folder.open_existing(address)[0].is_done(grid.runs[0])
    objects = Objects(address)
    objects.delete(objects.names())
    assert not stored_folder.create(address, grid)[0].is_done(grid.runs[0])
    Objects(f"{address}-other").write("notes.txt", b"mine")
    with pytest.raises(InputError, match="neither empty nor the folder of a sweep"):
        stored_folder.look(f"{address}-other", grid)


class Interrupted:
    """A launcher whose operator has had enough."""

    slots = 1

    def run(self, commands):
        raise KeyboardInterrupt
        yield


def test_while_others_may_be_at_work_nothing_is_added_up(address, notes, tmp_path):
    grid = grid_lib.read(toml(tmp_path / "grid.toml", notes, GRID, public_data=False))
    folder, everything = stored_folder.create(address, grid)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(folder, grid, everything, Interrupted())
    said = json.loads(Objects(address).read(["report.json"])["report.json"])
    assert said["epsilon"] is None and "has not been added up" in said["statement"]


def test_no_sum_is_stated_from_before_the_first_step_on(address, notes, tmp_path):
    """A report of an earlier state is gone when the first process starts."""
    grid = grid_lib.read(toml(tmp_path / "grid.toml", notes, GRID, public_data=False))
    folder, everything = stored_folder.create(address, grid)
    Objects(address).write("report.json", b'{"epsilon": 0.5}')

    class Looking(Interrupted):
        def run(self, commands):
            self.seen = json.loads(Objects(address).read(["report.json"])["report.json"])
            raise KeyboardInterrupt
            yield

    launcher = Looking()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(folder, grid, everything, launcher)
    assert launcher.seen["epsilon"] is None and "has not been added up" in launcher.seen["statement"]


def test_no_machine_takes_away_what_another_has_kept(address, notes, tmp_path, monkeypatch):
    """A longer ledger of one run, and one that went on otherwise, beside a shorter one that is published later."""
    grid = grid_lib.read(toml(tmp_path / "grid.toml", notes, GRID, public_data=False))
    one, other = two_machines(address, tmp_path, monkeypatch, grid)
    first = b'{"run_id": "r"}\n'
    for folder, lines in ((one, first + b"a\nb\n"), (other, first + b"a\n"), (other, first + b"c\n")):
        privacy.keep(folder, lines)
    one.publish()
    other.publish()
    objects = Objects(address)
    kept = {content for content in objects.read(objects.names("spent")).values()}
    assert {first + b"a\nb\n", first + b"c\n"} <= kept and first + b"a\n" not in kept


def workers(address):
    """Process numbers of the workers that are at work in a sweep."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().decode().split("\0")
            if "experiments.sweep.worker" in words and address in words:
                found.append(int(place.parent.name))
    return found


def start(server, cache, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [*COMMAND, "sweep", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment | object_storage.machine(server, cache),
    )  # fmt: skip


@pytest.mark.slow
def test_killed_workers_and_two_machines_end_in_the_table_of_a_disk(server, address, notes, tmp_path):
    config = toml(tmp_path / "grid.toml", notes, GRID)
    on_disk = start(server, tmp_path / "disk_cache", config, f"--workdir={tmp_path / 'disk'}", "--slots=2", "--json")
    _, err = on_disk.communicate()
    assert on_disk.returncode == 0, err

    objects = Objects(address)
    killed = start(server, tmp_path / "a", config, f"--workdir={address}", "--slots=2")
    wait_for(lambda: any("/ledger.d/" in name and name.endswith("3") for name in objects.names("runs")), killed)
    for process in workers(address):
        os.kill(process, signal.SIGKILL)
    time.sleep(1.0)
    killed.kill()
    killed.communicate()
    for process in workers(address):
        os.kill(process, signal.SIGKILL)
    before = [name for name in objects.names("runs") if name.endswith("result.json")]
    assert len(before) < 3

    both = [start(server, tmp_path / name, config, f"--workdir={address}", "--slots=1", "--json") for name in "bc"]
    for process in both:
        out, err = process.communicate(timeout=580)
        assert process.returncode == 0, err
        assert json.loads(out)["done"] == 3
    assert objects.read(["results.csv"])["results.csv"] == (tmp_path / "disk" / "results.csv").read_bytes()
    for name in "bc":
        (table,) = (tmp_path / name).glob("dpgemma/sweeps/*/results.csv")
        assert table.read_bytes() == (tmp_path / "disk" / "results.csv").read_bytes()
    assert json.loads(objects.read(["report.json"])["report.json"])["runs"] == 3


@pytest.mark.slow
def test_a_sweep_of_private_data_adds_up_what_its_runs_cost(server, address, notes, tmp_path):
    """With the noise of the runs, as on a disk; and the losses lie where the table of private data does."""
    table = GRID | {"noise_batch_ratio": ["2^-1", 1], "steps": 4}
    config = toml(tmp_path / "grid.toml", notes, table, public_data=False)
    for workdir in (tmp_path / "disk", address):
        done = start(server, tmp_path / "cache", config, f"--workdir={workdir}", "--slots=2")
        _, err = done.communicate(timeout=580)
        assert done.returncode == 0, err
    objects = Objects(address)
    said, on_disk = (
        json.loads(text)
        for text in (objects.read(["report.json"])["report.json"], (tmp_path / "disk" / "report.json").read_text())
    )
    assert said["runs"] == on_disk["runs"] == 2
    assert 0 < said["epsilon"] == pytest.approx(on_disk["epsilon"], rel=0.05)  # numbers of held-out rows differ
    names = objects.names()
    assert "private/results.csv" in names and "results.csv" not in names
    assert sum(name.startswith("spent/") for name in names) == 2
    # A machine that has seen nothing of it, and a run that was deleted meanwhile: it has cost what it has cost.
    run = grid_lib.read(config).runs[0]
    objects.delete(objects.names(f"runs/{run.id}"))
    again = start(server, tmp_path / "other", config, f"--workdir={address}", "--slots=2")
    _, err = again.communicate(timeout=580)
    assert again.returncode == 0, err
    after = json.loads(objects.read(["report.json"])["report.json"])
    assert after["runs"] == 3 and after["epsilon"] > said["epsilon"]
