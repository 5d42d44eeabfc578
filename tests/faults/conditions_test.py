"""What may be wrong with a machine while the program runs on it: for each, what is said, and what survives."""

import ctypes
import functools
import os
import random
import resource
import shutil
import time

import numpy as np
import pytest

from dpgemma.commands.terminal import Terminal
from tests.faults.begun import SMALL, begin
from tests.faults.program import READ_ONLY, Fault
from tests.training.runs import assert_same_bits, call, final_parameters, flags, step_records

pytestmark = pytest.mark.slow
RUN = SMALL | dict(steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def begun(the_program, text, tmp_path_factory):
    """A run that has taken no step; never changed."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    begin(the_program, flags(text, workdir, **RUN), workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(the_program, text, begun, tmp_path_factory):
    """The same run when it has ended; never changed."""
    workdir = shutil.copytree(begun, tmp_path_factory.mktemp("whole") / "run")
    done = the_program.run(*flags(text, workdir, **RUN))
    assert done.returncode == 0, done.err
    return workdir


def is_refused(done, *said):
    last = done.err.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("dpgemma: ") and "Traceback" not in done.err, done
    assert all(text in last for text in said), last


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_on_a_disk_that_can_only_be_read_a_run_is_looked_at_and_not_gone_on_with(the_program, text, whole, tmp_path):
    place = tmp_path / "place"
    run, begun = shutil.copytree(whole, place / "run"), shutil.copytree(whole, place / "begun")
    cut(begun)
    before, fault = files(place), Fault(place, READ_ONLY, 1)
    is_refused(the_program.run(*flags(text, begun, **RUN), fault=fault), "Read-only file system")
    is_refused(the_program.run(*flags(text, place / "new", **RUN), fault=fault), "Read-only file system")
    is_refused(the_program.run("export", f"--workdir={run}", f"--out={tmp_path / 'out'}", fault=fault), "Read-only")
    assert files(place) == before and not (tmp_path / "out").exists()
    sample = ["sample", f"--workdir={run}", "--prompt=case ", "--max_new_tokens=3"]
    for arguments in (["audit", run], sample, ["evaluate", f"--workdir={run}", f"--data={text}", "--json"]):
        done = the_program.run(*arguments, fault=fault)
        assert done.returncode == 0, done
    assert files(place) == before


def cut(run):
    """Makes a run's last checkpoint and what came with it undone, as a crash before it would have."""
    shutil.rmtree(run / "checkpoints" / "4")
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    upto = next(i for i, line in enumerate(lines) if '"kind":"stored"' in line and '"step":2' in line)
    (run / "ledger.jsonl").write_text("".join(lines[: upto + 1]))


FILES = ("config.json", "ledger.jsonl", "private/keys.json", "private/data.json", "metrics.jsonl", "checkpoints/2")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_has_a_wrong_bit_changes_no_number(name, the_program, text, whole, tmp_path):
    """The run is refused and its files are left, or it ends as the undisturbed one did."""
    rng = random.Random(name)
    refused = ended = 0
    for number in range(12):
        run = shutil.copytree(whole, tmp_path / str(number))
        cut(run)
        path = run / name
        if path.is_dir():
            path = rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size))
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        before = files(run)
        done = the_program.run(*flags(text, run, **RUN))
        if done.returncode == 0:
            ended += 1
            assert step_records(run) == step_records(whole), (path, done)
            assert_same_bits(final_parameters(run)[1], final_parameters(whole)[1])
            same = (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
            assert same or "metrics.jsonl was changed since step 2 was saved" in done.err, (path, done)
        else:
            refused += 1
            is_refused(done)
            after = files(run)
            for file, content in before.items():  # logs grow; a line that a crash cut off is dropped from the ledger
                kept = content if file.name != "ledger.jsonl" else content[: content.rfind(b"\n") + 1]
                assert after[file].startswith(kept), (file, done)
    assert refused + ended == 12 and (ended if name in ("metrics.jsonl", "checkpoints/2") else refused)


def set_back_the_clock_in_every_step():
    """By a day each time."""
    ordinary = Terminal.step

    def step(self, released, private):
        ctypes.CDLL(None).clock_fault_arm(ctypes.c_long(86400 * released.steps))
        ordinary(self, released, private)

    Terminal.step = step


def test_a_clock_that_goes_backwards_changes_nothing(the_program, text, begun, whole, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    done = the_program.run(*flags(text, run, **RUN), before=set_back_the_clock_in_every_step)
    assert done.returncode == 0 and "Traceback" not in done.err, done
    assert step_records(run) == step_records(whole)
    assert_same_bits(final_parameters(run)[1], final_parameters(whole)[1])
    for name in ("metrics.jsonl", "config.json", "private/metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert call("audit", run).returncode == 0


def starve_at_the_first_step():
    """Leaves memory for threads, and not for a step's arrays."""
    ordinary = Terminal.begin

    def begin(*arguments):
        ordinary(*arguments)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))

    Terminal.begin = begin


def test_a_step_that_finds_no_memory_ends_the_run_where_it_can_go_on(the_program, text, tmp_path):
    large = RUN | dict(model="tiny", batch_size=64, max_batch_size=1024, microbatch_size=1024, clipping="vmap")
    done = the_program.run(*flags(text, tmp_path / "whole", **large))
    assert done.returncode == 0, done
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    cut(run)
    starved = the_program.run(*flags(text, run, **large), before=starve_at_the_first_step)
    is_refused(starved, "the memory is used up")
    done = the_program.run(*flags(text, run, **large))
    assert done.returncode == 0 and "resuming at step 2 of 4" in done.err, done
    assert_same_bits(final_parameters(run)[1], final_parameters(tmp_path / "whole")[1])
    assert call("audit", run).returncode == 0


def pause_after_the_first_step(until):
    ordinary = Terminal.step

    def step(self, released, private):
        ordinary(self, released, private)
        while not until.exists():
            time.sleep(0.01)

    Terminal.step = step


def test_two_trainers_do_not_share_a_folder(the_program, text, begun, whole, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    pause = functools.partial(pause_after_the_first_step, tmp_path / "go on")
    first = the_program.start(*flags(text, run, **RUN), before=pause)
    while len(step_records(run)) < 1:
        assert first.exitcode is None
        time.sleep(0.05)
    second = call(*flags(text, run, **RUN))
    assert second.returncode == 2 and "another process is training in" in second.stderr
    (tmp_path / "go on").touch()
    done = the_program.end_of(first)
    assert done.returncode == 0, done
    assert_same_bits(final_parameters(run)[1], final_parameters(whole)[1])


def become_nobody():
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_without_rights_to_private_a_run_is_not_gone_on_with(the_program, text, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    for place in (run, tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    done = the_program.run(*flags(text, run, **RUN), before=become_nobody)
    is_refused(done, "Permission denied")


def test_keys_that_others_can_read_are_named_at_the_start(the_program, text, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    cut(run)
    (run / "private" / "keys.json").chmod(0o644)
    done = the_program.run(*flags(text, run, **RUN))
    assert done.returncode == 0 and f"warning: others can read {run}/private/keys.json" in done.err, done.err


def test_weights_that_are_no_numbers_are_not_trained_on(text, whole, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    done = call("export", f"--workdir={shutil.copytree(whole, tmp_path / 'run')}", f"--out={tmp_path / 'model'}")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = sorted(weights)[-1]
    for value in (np.nan, np.inf):
        weights[name] = weights[name].copy()
        weights[name].reshape(-1)[-1] = value
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        arguments = flags(text, tmp_path / "tuned", **{k: v for k, v in RUN.items() if k != "model"})
        done = call(*arguments, f"--init_from={tmp_path / 'model'}")
        assert done.returncode == 2 and f"tensor {name} of" in done.stderr and "NaN or infinity" in done.stderr
        assert not (tmp_path / "tuned").exists()
