import dataclasses
import fcntl
import json
import math
import os
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import jax
import pytest

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import chain as ledger
from accounting.ledger import executed
from dpgemma import cli
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from experiments.sweep import folder as folder_lib
from experiments.sweep import grid as grid_lib
from experiments.sweep import launchers, privacy, results
from tests.experiments.sweeps import GRID, run_sweep, state, toml
from tests.training.runs import COMMAND, call, wait_for


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that all processes of a parallel test run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sweeps"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Workers are not told of this process's virtual devices, which it has taken by then."""
    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        patch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # else its import closes what pytest writes to
        yield


@pytest.fixture(scope="module")
def finished(place, notes):
    """A finished sweep, never changed by a test: (its file, its folder, the completed command)."""
    with open(place / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (place / "done.json").is_file():
            shutil.copy(notes, place / "text.txt")
            toml(place / "first.toml", place / "text.txt", GRID)
            done = call("sweep", place / "first.toml", f"--workdir={place / 'out'}", "--slots=2", "--json")
            (place / "done.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    code, out, err = json.loads((place / "done.json").read_text())
    assert code == 0, err
    return place / "first.toml", place / "out", subprocess.CompletedProcess([], code, out, err)


@pytest.fixture(scope="module")
def text(finished):
    """The data; programs for them have been compiled."""
    return finished[0].with_name("text.txt")


def start(*arguments):
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_sweep_of_real_trainings_ends_in_a_table(finished):
    config, out, done = finished
    said = json.loads(done.stdout)
    table_file = out / "results.csv"
    facts = {
        "runs": 3,
        "done": 3,
        "failed": {},
        "table": str(table_file),
        "report": str(out / "report.json"),
        "public_data": True,
    }
    assert (
        facts.items() <= said.items() and said["law"] is None and "no law is fitted" in done.stderr
    )  # of one model alone
    table = results.read(table_file)
    assert tuple(table.columns) == results.COLUMNS and len(table) == 3 * 8
    size = decoder.num_parameters(PRESETS["ladder_20k"])
    for ratio, run in zip((0, 2**-7, 2**-5), grid_lib.read(config).runs, strict=True):
        rows = table.rows(table["Config"] == run.id)
        assert rows["Iterations"].tolist() == list(range(1, 9)) and set(rows["Noise Batch Ratio"]) == {ratio}
        losses = rows["Cross Entropy"]
        assert losses[-1] < losses[0] < math.log(260) + 0.5 and 3 < rows["Eval Loss"][-1] < losses[0]
        assert (
            rows["Tokens"][-1] == 4 * 16 * 8
            and rows["FLOPs"][-1] == 6 * size * 4 * 16 * 8
            and set(rows["Parameters"]) == {size}
        )
    said = json.loads((out / "report.json").read_text())
    assert (
        said["public_data"]
        and said["runs"] == 3
        and said["epsilon"] is None
        and "declares to be public" in said["statement"]
    )


@pytest.mark.slow
def test_the_same_command_again_executes_nothing(finished, monkeypatch):
    config, out, _ = finished
    monkeypatch.setattr(launchers, "Process", None)
    before = state(out / "runs"), (out / "results.csv").read_bytes(), state(out)[out / "grid.json"]
    done = call("sweep", config, f"--workdir={out}")
    assert done.returncode == 0 and "3 of 3 runs are done" in done.stdout and "100 % of the work" in done.stderr
    assert (state(out / "runs"), (out / "results.csv").read_bytes(), state(out)[out / "grid.json"]) == before


@pytest.mark.slow
def test_a_killed_sweep_repeats_nothing_that_was_done(finished, tmp_path):
    config, whole, _ = finished
    out = tmp_path / "out"

    def begun():
        return any(path.stat().st_size for path in out.glob("runs/*/run/metrics.jsonl"))

    rng = random.Random()
    kept = {}
    for kill in range(3):
        process = start("sweep", config, f"--workdir={out}", "--slots=2")
        if kill == 0:
            wait_for(begun, process)
        time.sleep(rng.uniform(0, 5))
        process.kill()
        process.communicate()
        now = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("runs/*/result.json")}
        assert kept.items() <= now.items()
        kept = now
    done = call("sweep", config, f"--workdir={out}", "--slots=2")
    assert done.returncode == 0, done.stderr
    assert kept.items() <= state(out / "runs").items()
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    for path in out.glob("runs/*/run/ledger.jsonl"):  # steps that were taken again are the same steps
        facts = executed.of(ledger.read(path))
        assert facts.finished and facts.steps == 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_at_a_checkpoint(number, text, tmp_path):
    config = toml(
        tmp_path / "long.toml", text, GRID | dict(noise_batch_ratio="2^-7", steps=100_000, checkpoint_every=100_000)
    )
    process = start("sweep", config, f"--workdir={tmp_path / 'out'}", "--slots=1")
    (run,) = grid_lib.read(config).runs
    place = tmp_path / "out" / "runs" / run.id / "run"
    wait_for(lambda: (place / "metrics.jsonl").is_file() and (place / "metrics.jsonl").stat().st_size, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.splitlines()[-1] == "dpgemma: interrupted with 0 of 1 runs done; the same command goes on from there"
    steps = len((place / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (place / "checkpoints").iterdir() if path.name.isdecimal()] == [str(steps)]
    assert "the same command goes on from here" in (place.parent / "log.txt").read_text()


# Dies where the command is to execute certain runs: the first the first time, the second always.
DIES = """
import os, pathlib, signal, sys
mark, once, always, *command = sys.argv[1:]
if always in command or (once in command and not pathlib.Path(mark).exists()):
    pathlib.Path(mark).touch()
    os.kill(os.getpid(), signal.SIGKILL)
os.execv(command[0], command)
"""


@pytest.mark.slow
def test_what_dies_is_tried_again_and_what_cannot_be_done_is_named(text, tmp_path, monkeypatch, capfd):
    many = GRID | dict(noise_batch_ratio=0, batch_size=100_000, max_batch_size=100_000)
    config = toml(tmp_path / "bad.toml", text, GRID | dict(noise_batch_ratio=["2^-7", "2^-5"]), many)
    once, always, refused = (run.id for run in grid_lib.read(config).runs)
    ordinary = launchers.worker_command

    def wrapped(*arguments):
        return [
            sys.executable,
            "-c",
            DIES,
            str(tmp_path / "mark"),
            once,
            always,
            *ordinary(*arguments),
        ]

    monkeypatch.setattr(launchers, "worker_command", wrapped)
    arguments = ["sweep", str(config), f"--workdir={tmp_path / 'out'}", "--slots=2", "--retries=1"]
    assert cli.main(arguments) == 1
    out, err = capfd.readouterr()
    assert "1 of 3 runs are done" in out and "a process ended with 137" in err
    named = {line.split()[2]: line for line in err.splitlines() if line.startswith("dpgemma: run ")}
    assert set(named) == {always, refused}
    assert "ladder_20k, noise_batch_ratio 0.03125" in named[always] and "died 2 times in a row" in named[always]
    assert "exceeds the" in named[refused] and "training units" in named[refused]
    # The next command tries what failed again, and nothing else.
    monkeypatch.undo()
    before = state(tmp_path / "out" / "runs" / once)
    assert cli.main([*arguments, "--json"]) == 1
    said = json.loads(capfd.readouterr().out)
    assert set(said["failed"]) == {refused} and said["done"] == 2 and state(tmp_path / "out" / "runs" / once) == before


@pytest.mark.slow
def test_pitfall_25_a_sweep_of_private_data_adds_up_all_its_runs(text, tmp_path):
    table = GRID | dict(noise_batch_ratio=[0.125, 0.25], steps=4)
    config = toml(tmp_path / "private.toml", text, table, public_data=False)
    out = tmp_path / "out"
    assert not run_sweep(config, out, launchers.LocalPool(2)).failed
    # Raw losses lie in folders that are closed to others, and nowhere else.
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700 and not (out / "results.csv").exists()
    assert not list(out.glob("runs/*/result.json")) and len(list(out.glob("runs/*/private/result.json"))) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in out.glob("runs/*/private"))

    said = json.loads((out / "report.json").read_text())
    both = [
        m for path in sorted(out.glob("runs/*/run/ledger.jsonl")) for m in executed.of(ledger.read(path)).mechanisms
    ]
    assert sorted(m.noise_multiplier for m in both) == [0.5, 1] and [m.steps for m in both] == [4, 4]
    epsilon = Accountant(both).upper(1e-5)
    assert said["runs"] == 2 and epsilon <= said["epsilon"] <= epsilon + 1e-4 and said["delta"] == 1e-5
    assert "All 2 runs together" in said["statement"] and "raw and NOT covered" in said["statement"]

    # Keys are drawn anew for every run, so another sweep gives other results; a run without noise spends everything.
    again = toml(tmp_path / "again.toml", text, table | dict(noise_batch_ratio=[0.125, 0]), public_data=False)
    assert not run_sweep(again, tmp_path / "again", launchers.LocalPool(2)).failed
    tables = [results.read(place / "private" / "results.csv") for place in (out, tmp_path / "again")]
    same = grid_lib.read(config).runs[0].id
    ends = [table.rows(table["Config"] == same)["Cross Entropy"].tolist() for table in tables]
    assert len(ends[0]) == len(ends[1]) == 4 and ends[0] != ends[1]
    said = json.loads((tmp_path / "again" / "report.json").read_text())
    assert said["runs"] == 2 and said["epsilon"] == "inf" and said["statement"].startswith("NO PRIVACY")

    # Runs that the file does not name any more have been executed all the same.
    fewer = toml(tmp_path / "fewer.toml", text, table | dict(noise_batch_ratio=0.125), public_data=False)
    outcome = run_sweep(fewer, tmp_path / "again", launchers.LocalPool(2))
    assert len(outcome.table) == 2 * 4 and json.loads((tmp_path / "again" / "report.json").read_text()) == said
    # So have those whose folder was renamed to train them again.
    folder, everything = folder_lib.look(out, grid_lib.read(config))
    before = privacy.summary(folder, everything)
    place = folder.run_folder(everything.runs[0])
    place.rename(place.with_name("with_other_settings"))
    assert privacy.summary(folder, everything) == before and before["runs"] == 2
    # Commands that are handed out spend outside of this program: the old sum must not stand meanwhile.
    more = toml(tmp_path / "more.toml", text, table | dict(noise_batch_ratio=0.5), public_data=False)
    assert call("sweep", more, f"--workdir={out}", "--emit=-").stdout.count("dpgemma train") == 1
    said = json.loads((out / "report.json").read_text())
    assert said["epsilon"] is None and "has not been added up" in said["statement"]
    # A folder whose runs another version would name differently cannot be gone on with, nor be taken for an empty one.
    stored = (out / "grid.json").read_text()
    (out / "grid.json").write_text(stored.replace(everything.runs[0].id, "0123456789ab"))
    with pytest.raises(InputError, match="of another version"):
        folder_lib.look(out, grid_lib.read(config))
    (out / "grid.json").write_text(stored)
    with pytest.raises(InputError, match="public_data = false"):
        folder_lib.look(out, dataclasses.replace(grid_lib.read(config), public_data=True))


@pytest.mark.slow
def test_emitted_commands_are_taken_in_by_the_next_sweep(text, tmp_path, monkeypatch):
    data = tmp_path / "it's a text.txt"
    data.write_bytes(text.read_bytes())
    config = toml(tmp_path / "pods.toml", data, GRID | dict(noise_batch_ratio=["2^-7", "2^-5"], steps=4))
    out = tmp_path / "out here"
    arguments = ["sweep", config, f"--workdir={out}"]
    assert call(*arguments, f"--emit={tmp_path / 'jobs.txt'}").stdout == ""
    lines = (tmp_path / "jobs.txt").read_text().splitlines()
    assert len(lines) == 2 and call(*arguments, "--emit=-").stdout.splitlines() == lines
    # A shell takes them apart as they were meant.
    shown = subprocess.run(
        ["bash", "-c", f"dpgemma() {{ printf '%s\\n' \"$@\"; }}; {lines[0]}"], capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == shlex.split(lines[0])[1:] and f"--data={data}" in shown.stdout.splitlines()
    program, *command = shlex.split(lines[0])
    alone = launchers.environment([]) | {"DPGEMMA_ENDS_WITH_INPUT": ""}
    done = subprocess.run([*COMMAND, *command], env=alone, capture_output=True, text=True)
    assert program == "dpgemma" and done.returncode == 0, done.stderr
    monkeypatch.setattr(launchers, "Process", None)  # nothing is started
    trained = {path: content for path, content in state(out / "runs").items() if "checkpoints" not in path.parts}
    first = toml(tmp_path / "first.toml", data, GRID | dict(noise_batch_ratio="2^-7", steps=4))
    done = call("sweep", first, f"--workdir={out}")
    assert done.returncode == 0 and "1 of 1 runs are done" in done.stdout, done.stderr
    assert trained.items() <= state(out / "runs").items() and len(results.read(out / "results.csv")) == 4
    assert call(*arguments, "--emit=-").stdout.splitlines() == lines[1:]


@pytest.mark.slow
def test_a_dry_run_says_what_is_left(finished, text, tmp_path):
    config, out, _ = finished
    size = decoder.num_parameters(PRESETS["ladder_20k"])
    arguments = ["sweep", config, "--dry_run", "--slots=3"]
    said = json.loads(call(*arguments, f"--workdir={tmp_path / 'new'}", "--json").stdout)
    assert (said["runs"], said["pending"], said["slots"]) == (3, 3, 3) and said["flops"] == 3 * 6 * size * 4 * 16 * 8
    seconds = said["seconds_per_unit"]["ladder_20k"]
    assert (
        0 < seconds < 1
        and said["hours"] == pytest.approx(3 * 8 * 4 * seconds / 3 / 3600)
        and "from a trial" in said["basis"]
    )
    assert not (tmp_path / "new").exists()
    assert "0 of 3 runs are left" in call(*arguments, f"--workdir={out}").stdout
    # What finished runs took says what further ones will take.
    more = toml(tmp_path / "more.toml", text, GRID | dict(steps=16, noise_batch_ratio=0))
    said = json.loads(call("sweep", more, "--dry_run", "--json", "--slots=1", f"--workdir={out}").stdout)
    took = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    mean = sum(result["seconds"] for result in took) / (3 * 8 * 4)
    assert said["seconds_per_unit"] == {"ladder_20k": pytest.approx(mean)} and "finished runs took" in said["basis"]
    assert (
        said["pending"] == 1
        and said["flops"] == 6 * size * 4 * 16 * 16
        and said["hours"] == pytest.approx(16 * 4 * mean / 3600)
    )
    said = call("sweep", more, "--dry_run", "--slots=1", f"--workdir={out}").stdout
    assert said.startswith("1 of 1 runs are left: ") and "seconds a unit" in said and "finished runs took" in said


@pytest.mark.slow
def test_slurm_jobs_compute_the_same_bits(finished, tmp_path):
    pytest.importorskip("submitit")
    config, out, _ = finished
    outcome = run_sweep(
        config, tmp_path / "out", launchers.Slurm(2, tmp_path / "logs", cluster="local", parameters={"timeout_min": 20})
    )
    assert not outcome.failed and (tmp_path / "out" / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


@pytest.mark.slow
def test_tasks_on_two_nodes_of_ray_compute_the_same_bits(finished, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    config, out, _ = finished
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        launcher = launchers.Ray(address=cluster.address)
        assert launcher.slots == 2 and len([node for node in ray.nodes() if node["Alive"]]) == 2
        outcome = run_sweep(config, tmp_path / "out", launcher)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not outcome.failed and (tmp_path / "out" / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
