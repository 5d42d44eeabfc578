"""What a sweep starts, in which order, and what it refuses: with workers that train nothing."""

import json
import pathlib

import pytest

from accounting.errors import InputError
from dpgemma import cli
from experiments.sweep import folder as folder_lib
from experiments.sweep import grid as grid_lib
from experiments.sweep import launchers, sweep, worker
from tests.experiments.sweeps import GRID, run_sweep, toml
from tests.training.runs import call


def test_a_run_that_cannot_be_done_does_not_stop_those_behind_it(notes, tmp_path, monkeypatch):
    config = toml(tmp_path / "few.toml", notes, GRID)
    folder, grid = folder_lib.create(tmp_path / "out", grid_lib.read(config))
    tried = []

    def execute(folder, run):
        tried.append(run.id)
        if len(tried) == 1:
            raise InputError("it is\nimpossible")
        if len(tried) == 3:
            raise worker.Stopped

    for name, replacement in (("settle", None), ("share_programs", None), ("log_to", None), ("execute", execute)):
        monkeypatch.setattr(worker, name, replacement or (lambda *_: None))
    ids = [run.id for run in grid.runs]
    assert worker.main([str(folder.path), *ids[:2]]) == worker.REFUSED and tried == ids[:2]
    assert [folder.error(run) for run in grid.runs] == ["it is impossible", None, None]
    assert worker.main([str(folder.path), *ids]) == worker.STOPPED and tried == [*ids[:2], ids[0]]
    assert worker.main([str(tmp_path), *ids]) == worker.REFUSED


class Fake:
    """A launcher whose processes do not get far."""

    slots = 1

    def __init__(self, act=lambda place: None):
        self.act, self.started = act, 0

    def run(self, commands):
        for number, (_, _, _, path, name) in enumerate(commands):
            self.started += 1
            self.act(pathlib.Path(path) / "runs" / name / "run")
            yield number, worker.STOPPED, ""


def test_a_run_that_its_process_did_not_come_to_has_not_been_tried(notes, tmp_path):
    config = toml(tmp_path / "two.toml", notes, GRID | dict(noise_batch_ratio=[0.5, 1]))
    launcher = Fake()
    grid = grid_lib.read(config)
    folder, everything = folder_lib.create(tmp_path / "out", grid)
    jobs = []
    launcher.run = lambda commands: (
        jobs.append(command[4:]) or (i, launchers.KILLED, "") for i, command in enumerate(commands)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sweep, "batches", lambda pending, slots, most: [pending[i : i + most] for i in range(0, len(pending), most)]
        )
        with folder.locked():
            outcome = sweep.run(folder, grid, everything, launcher, retries=0)
    assert [len(job) for job in jobs] == [2, 1] and jobs[1] == jobs[0][1:] and len(outcome.failed) == 2


def test_a_private_sweep_in_flight_leaves_no_report_that_says_too_little(notes, tmp_path):
    config = toml(tmp_path / "private.toml", notes, GRID | dict(noise_batch_ratio=1), public_data=False)
    seen = []
    launcher = Fake(lambda _: seen.append(json.loads((tmp_path / "out" / "report.json").read_text())))
    assert len(run_sweep(config, tmp_path / "out", launcher, retries=0).failed) == 1
    assert seen[0]["epsilon"] is None and "has not been added up" in seen[0]["statement"]
    assert "nothing has been spent" in json.loads((tmp_path / "out" / "report.json").read_text())["statement"]


def test_a_run_that_gets_further_is_not_given_up(notes, tmp_path):
    config = toml(tmp_path / "slow.toml", notes, GRID | dict(noise_batch_ratio="2^-7"))

    def one_step_more(place):  # as where a queue ends its jobs; the last of five is never passed
        place.mkdir(parents=True, exist_ok=True)
        (place / "metrics.jsonl").write_text("{}\n" * min(launcher.started, 5))

    launcher = Fake(one_step_more)
    outcome = run_sweep(config, tmp_path / "out", launcher, retries=1)
    assert launcher.started == 5 + 2 and "died 2 times in a row" in next(iter(outcome.failed.values()))


BAD = {
    "no file": (["--workdir={tmp}/out"], "which grid to run"),
    "missing file": (["{tmp}/none.toml"], "does not exist"),
    "no preset": (["{tmp}/preset.toml"], "ladder_9t is no preset"),
    "long rows": (["{tmp}/rows.toml"], "exceeds the 256 tokens"),
    "no data": (["{tmp}/data.toml"], "no file matches"),
    "mesh": (["{tmp}/mesh.toml"], "mesh must be"),
    "tokenizer": (["{tmp}/tokenizer.toml"], "no tokenizer file"),
    "no slots": (["{tmp}/good.toml", "--slots=0"], "--slots must be at least 1"),
    "no runs": (["{tmp}/good.toml", "--runs_per_process=0"], "--runs_per_process must be at least 1"),
    "retries": (["{tmp}/good.toml", "--retries=-1"], "--retries must be at least 0"),
    "emit as JSON": (["{tmp}/good.toml", "--emit=-", "--json"], "drop --json"),
    "emit nothing": (["{tmp}/good.toml", "--emit=-", "--dry_run"], "drop --dry_run"),
    "another folder": (["{tmp}/good.toml", "--workdir={tmp}"], "nor the folder of a sweep"),
    "no Slurm": (["{tmp}/good.toml", "--launcher=slurm"], "there is no Slurm here"),
    "Slurm's parameters": (["{tmp}/good.toml", "--launcher=slurm", "--slurm_parameters=gpu"], "must look like"),
    "parameters for nobody": (["{tmp}/good.toml", "--slurm_parameters=partition=gpu"], "are for --launcher=slurm"),
    "private rows of two lengths": (
        ["{tmp}/lengths.toml"],
        "differ in sequence_length (16, 32), so their privacy does not add up",
    ),
    "too large a batch": (["{tmp}/batch.toml"], "batch_size must be at most"),
    "two positions": (["{tmp}/good.toml", "more"], "unexpected argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_starts_nothing(case, notes, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # else its import closes what pytest writes to
    changes = {
        "good": {},
        "preset": {"model": "ladder_9t"},
        "rows": {"sequence_length": 257},
        "mesh": {"mesh": "auto"},
        "data": {"data": "/nowhere/x.txt"},
        "tokenizer": {"tokenizer": "/nowhere/t.model"},
    }
    for name, change in changes.items():
        toml(tmp_path / f"{name}.toml", notes, GRID | change)
    toml(tmp_path / "lengths.toml", notes, GRID | {"sequence_length": [16, 32]}, public_data=False)
    toml(tmp_path / "batch.toml", notes, GRID | {"batch_size": 10**400})
    arguments, message = BAD[case]
    if "--launcher=slurm" in arguments:
        pytest.importorskip("submitit")
    workdir = [] if any("--workdir" in a for a in arguments) else [f"--workdir={tmp_path}/out"]
    assert cli.main(["sweep", *(a.format(tmp=tmp_path) for a in arguments + workdir)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.startswith("dpgemma: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "out" / "grid.json").exists()


def test_one_sweep_at_a_time_works_in_a_folder(notes, tmp_path):
    config = toml(tmp_path / "one.toml", notes, GRID)
    folder, _ = folder_lib.create(tmp_path / "out", grid_lib.read(config))
    with folder.locked():
        done = call("sweep", config, f"--workdir={folder.path}")
    assert done.returncode == 2 and "another sweep is at work" in done.stderr and len(done.stderr.splitlines()) == 1


def test_long_runs_and_those_to_fit_come_first_and_programs_in_common_stay_together():
    content = {
        "sweep": {"public_data": True},
        "grid": [
            {
                "model": ["ladder_20k", "ladder_95k"],
                "noise_batch_ratio": [0, 0.1, 0.2, 0.3],
                "learning_rate": 0.01,
                "steps": 4,
            },
            {"model": "ladder_850k", "noise_batch_ratio": [0.1], "learning_rate": 0.01, "steps": 4, "held_out": True},
        ],
    }
    jobs = sweep.batches(grid_lib.parse(content, "x").runs, slots=1, most=3)
    assert [(job[0].config.model, len(job)) for job in jobs] == [
        ("ladder_95k", 3),
        ("ladder_95k", 1),
        ("ladder_20k", 3),
        ("ladder_20k", 1),
        ("ladder_850k", 1),
    ]
