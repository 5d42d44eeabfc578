"""Several processes train one run: as one process would, with one record, and none outlives another's death."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpgemma.training import checkpoint
from tests.training import runs

MODEL = "ladder_20k"
SETTINGS = dict(model=MODEL, sequence_length=16, checkpoint_every=2)


def flags(text, workdir, steps=4, **changes):
    return runs.flags(text, workdir, steps, **SETTINGS | changes)


def records(workdir, kind):
    lines = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def has_step(workdir, step):
    ledger = workdir / "ledger.jsonl"
    return ledger.is_file() and f'"step":{step}}}\n' in ledger.read_text()


# Trains with keys that are known, which no flag does, so that two runs can be compared.
WITH_KNOWN_KEYS = """
import sys
from dpgemma.commands import command_flags, peers, process
from absl import flags
from dpgemma.privacy.keys import Keys
from dpgemma.training.settings import Settings
fv = flags.FlagValues()
command_flags.define_from_dataclass(Settings, fv)
for name in ("workdir", "coordinator"):
    command_flags.string(name, None, name, fv)
for name in ("num_processes", "process_id"):
    command_flags.count(name, None, name, fv)
fv(["known_keys", *sys.argv[2:]])
settings = Settings(**{name: fv[name].value for name in Settings.__dataclass_fields__})
with process.temporarily(process.set_deterministic_sums), peers.joined(
    fv.coordinator, fv.num_processes, fv.process_id
) as count:
    process.split_cpu(settings.mesh, count)
    from dpgemma.training.prepare import prepare_with_public_keys
    keys = Keys(*(bytes([number]) * 32 for number in range(5)))
    trainer = prepare_with_public_keys(settings, keys, fv.workdir)
    measured = trainer.train()
    print(measured)
"""


def with_known_keys(count, text, workdir, **changes):
    """The states of a run of so many processes, by step: SHA-256 of each; and what was measured."""
    command = [sys.executable, "-c", WITH_KNOWN_KEYS]
    given = flags(text, workdir, epsilon="inf", checkpoint_every=1, **changes)
    processes = runs.start_together(count, *given, command=command)
    outcomes = runs.ended(processes)
    assert [code for code, *_ in outcomes] == [0] * count, outcomes
    (measured,) = {output.splitlines()[-1] for _, output, _ in outcomes}
    saved = records(workdir, "checkpoint")
    return {record["step"]: record["state_sha256"] for record in saved}, measured


def begun(text, workdir):
    """Flags and processes of a long run of two that has taken a few steps."""
    given = flags(text, workdir, steps=400, mesh="data:2", checkpoint_every=399)
    processes = runs.start_together(2, *given)
    runs.wait_for(lambda: has_step(workdir, 3), processes[0])
    return given, processes


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "count, mesh, model, steps",
    [
        (2, "data:2", MODEL, 4),
        slow(2, "data:2", "tiny", 20),
        slow(4, "data:4", "tiny", 20),
        slow(2, "data:4", MODEL, 4),
        slow(2, "data:2,model:2", MODEL, 4),
        slow(2, "data:1,model:2", MODEL, 4),
        slow(2, "slice:2,data:2", MODEL, 4),
    ],
)
def test_the_states_of_a_run_do_not_depend_on_the_number_of_processes(count, mesh, model, steps, text, tmp_path):
    """Bit for bit: units are drawn, dealt out and noised as in one process, and whole numbers are added."""
    changes = dict(mesh=mesh, model=model, steps=steps)
    alone = with_known_keys(1, text, tmp_path / "alone", **changes)
    assert len(alone[0]) == steps
    assert with_known_keys(count, text, tmp_path / "together", **changes) == alone


@pytest.mark.parametrize("victim, count", [slow(1, 2), slow(0, 2), slow(2, 4)])
def test_none_outlives_another_and_another_number_of_processes_goes_on(victim, count, text, tmp_path):
    workdir = tmp_path / "run"
    processes = runs.start_together(count, *flags(text, workdir, steps=60, mesh=f"data:{count}", checkpoint_every=5))
    runs.wait_for(lambda: has_step(workdir, 7), processes[0])
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outcomes = runs.ended(processes, seconds=60)
    assert time.monotonic() - killed < 15
    keys = json.loads((workdir / "private/keys.json").read_text()).values()
    for number, (code, output, errors) in enumerate(outcomes):
        assert not any(key in output + errors for key in keys)
        if number != victim:
            assert code == 3 and errors.count("dpgemma: ") == 1 and "Traceback" not in errors, errors
            assert f"process {victim} has died" in errors or "a step failed" in errors
    # On the same mesh a step has the same bits: nothing is charged again, for which the budget has no room.
    again = runs.start_together(count // 2, *flags(text, workdir, steps=60, mesh=f"data:{count}", checkpoint_every=5))
    outcomes = runs.ended(again)
    assert [code for code, *_ in outcomes] == [0] * (count // 2), outcomes
    assert len(records(workdir, "step")) == 60 and "charged again" not in outcomes[0][2]
    audited = runs.run("audit", workdir)
    assert audited.returncode == 0, audited.stdout + audited.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_run_and_ends_all(text, tmp_path):
    workdir = tmp_path / "run"
    _, processes = begun(text, workdir)
    processes[1].send_signal(signal.SIGTERM)
    outcomes = runs.ended(processes, seconds=60)
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert "stopped at step" in outcomes[0][2] and outcomes[1][1] == ""
    saved = records(workdir, "checkpoint")[-1]["step"]
    assert saved == len(records(workdir, "step"))
    assert checkpoint.latest_parameters(workdir / "checkpoints")[0] == saved


@pytest.mark.slow
def test_only_the_first_process_writes_and_tells(text, tmp_path):
    workdir = tmp_path / "run"
    outcomes = runs.ended(runs.start_together(2, *flags(text, workdir, mesh="data:2")))
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert "held-out" in outcomes[0][1] and outcomes[1][1] == "" and "epsilon" not in outcomes[1][2]
    assert len(records(workdir, "step")) == 4 and len(records(workdir, "checkpoint")) == 2
    assert len((workdir / "private/metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({1: ["--steps=5"]}, "process 1 has other settings than process 0: steps (5 instead of 4)"),
        ({1: ["--data=/no/such/file.txt"]}, "/no/such/file.txt"),
        ({1: ["--data=OTHER"]}, "process 1 reads other data than process 0"),
        ({1: ["--workdir=ELSEWHERE"]}, "process 1 has other settings than process 0: workdir"),
    ],
)
def test_processes_that_do_not_agree_are_named_before_the_first_step(changes, sentence, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[1:])
    places = {"OTHER": other, "ELSEWHERE": tmp_path / "elsewhere"}
    changes = {
        i: [flag.replace(name, str(place)) for flag in given for name, place in places.items() if name in flag] or given
        for i, given in changes.items()
    }
    outcomes = runs.ended(runs.start_together(2, *flags(text, tmp_path / "run", mesh="data:2"), changes=changes))
    for code, output, errors in outcomes:
        assert code == 2 and output == "" and "Traceback" not in errors, errors
        assert sentence in errors and errors.count("dpgemma: ") == 1
    assert not (tmp_path / "run").exists()


def test_processes_in_other_environments_are_named_before_the_first_step(text, tmp_path):
    given = flags(text, tmp_path / "run", mesh="data:2")
    outcomes = runs.ended(runs.start_together(2, *given, variables={1: {"DNNL_MAX_CPU_ISA": "AVX2"}}))
    for code, _, errors in outcomes:
        assert code == 2 and "process 1 runs in another environment than process 0" in errors, errors
        assert "there DNNL_MAX_CPU_ISA" in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--num_processes=2"], "--num_processes and --process_id need --coordinator=HOST:PORT"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator must be auto or HOST:PORT"),
        (["--coordinator=localhost:1234"], "needs --num_processes and --process_id"),
        (["--coordinator=localhost:1234", "--num_processes=2", "--process_id=2"], "below --num_processes=2, got 2"),
        (["--coordinator=auto"], "this is none of them"),
        (["--coordinator=auto", "--process_id=0"], "drop them"),
    ],
)
def test_impossible_ways_of_joining_are_refused(given, sentence, text, tmp_path):
    done = runs.run(*flags(text, tmp_path / "run", mesh="data:2"), *given)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


# Waits for others for seconds, not minutes.
IMPATIENT = """
from dpgemma import cli
from dpgemma.commands import peers
from dpgemma.training import agreement
peers.SECONDS_TO_JOIN = agreement.SECONDS_TO_SEE = 3
cli.entry_point()
"""


def impatient(count, *given, missing=(), **options):
    """Outcomes of the processes of a run, but for those that are not started."""
    processes = runs.start_together(count, *given, command=[sys.executable, "-c", IMPATIENT], **options)
    for number in missing:
        processes[number].kill()
        processes[number].wait()
    outcomes = runs.ended(processes, seconds=60)
    return [outcome for number, outcome in enumerate(outcomes) if number not in missing]


@pytest.mark.parametrize(
    "missing, changes, sentence",
    [
        ([1], {}, "number 1 did not come within 3 seconds"),
        slow([0], {}, "did not reach process 0 at localhost"),
        ([], {1: ["--num_processes=3"]}, "says that it is number 1 of 3"),
        slow([], {1: ["--process_id=2"]}, "below --num_processes=2, got 2"),
    ],
)
def test_processes_that_do_not_come_together_are_refused(missing, changes, sentence, text, tmp_path):
    given = flags(text, tmp_path / "run", mesh="data:2")
    outcomes = impatient(2, *given, missing=missing, changes=changes)
    assert all(code == 2 and "Traceback" not in errors for code, _, errors in outcomes), outcomes
    assert any(sentence in errors for *_, errors in outcomes), outcomes
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_refused(text, tmp_path):
    with socket.create_server(("", 0)) as taken:
        address = f"--coordinator=localhost:{taken.getsockname()[1]}"
        given = flags(text, tmp_path / "run", mesh="data:2")
        done = runs.run(*given, address, "--num_processes=2", "--process_id=0")
    assert done.returncode == 2 and "process 0 cannot open port" in done.stderr


@pytest.mark.slow
def test_a_folder_that_the_processes_do_not_share_is_refused(text, tmp_path):
    """A relative path, from two places."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link = "import os, sys; os.chdir(sys.argv.pop(int(sys.argv[-1].partition('=')[2]) + 1)); del sys.argv[1]"
    link += "; sys.argv.insert(1, 'train')\n" + IMPATIENT
    given = [tmp_path / "a", tmp_path / "b", *flags(text, "run", mesh="data:2")[1:]]
    outcomes = runs.ended(runs.start_together(2, *given, command=[sys.executable, "-c", link]), seconds=90)
    for code, _, errors in outcomes:
        assert code == 2 and "process 1 does not see run as process 0 has written it" in errors, outcomes
    assert not (tmp_path / "b/run").exists()


@pytest.mark.slow
def test_two_jobs_do_not_train_one_run(text, tmp_path):
    given, first = begun(text, tmp_path / "run")
    second = runs.ended(runs.start_together(2, *given), seconds=60)
    for process in first:
        process.kill()
    runs.ended(first)
    for code, _, errors in second:
        assert code == 2 and "another process is training" in errors, second


@pytest.mark.slow
def test_somebody_else_at_the_coordinators_address_is_refused(text, tmp_path):
    with socket.create_server(("", 0)) as silent:
        address = f"--coordinator=localhost:{silent.getsockname()[1]}"
        given = [*flags(text, tmp_path / "run", mesh="data:2"), address, "--num_processes=2", "--process_id=1"]
        command = [sys.executable, "-c", IMPATIENT, *map(str, given)]
        done = subprocess.run(command, env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "does not answer as process 0 of a run" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_part_of_a_checkpoint_that_is_damaged_sets_all_of_it_aside(text, tmp_path):
    given = flags(text, tmp_path / "run", mesh="data:2")
    assert [code for code, *_ in runs.ended(runs.start_together(2, *given))] == [0, 0]
    parts = [path for path in (tmp_path / "run/checkpoints/4/state/ocdbt.process_1/d").iterdir() if path.is_file()]
    for part in parts:
        part.write_bytes(bytes(byte ^ 255 for byte in part.read_bytes()))
    outcomes = runs.ended(runs.start_together(2, *given), seconds=90)
    assert parts and [code for code, *_ in outcomes] == [0, 0], outcomes
    assert "checkpoint 4 has other files than the ledger recorded" in outcomes[0][2]
    assert "resuming at step 2 of 4" in outcomes[0][2] and runs.run("audit", tmp_path / "run").returncode == 0
