"""The disk is full at the first call that changes a file, at the second, and so on to the last: nothing is lost."""

import itertools
import json
import shutil

import pytest

from tests.faults.begun import SMALL, begin
from tests.faults.program import FULL, Fault
from tests.training.runs import assert_same_bits, call, final_parameters, flags, step_records

pytestmark = pytest.mark.slow


def said_in_one_sentence(done):
    last = done.err.strip().splitlines()[-1]
    return (
        done.returncode == 2
        and last.startswith("dpgemma: ")
        and "Traceback" not in done.err
        and ("No space left" in last or "make room" in last)
    )


def test_a_run_goes_on_from_a_disk_that_was_full_at_any_call(the_program, text, tmp_path):
    place, run = tmp_path / "place", tmp_path / "place" / "run"
    place.mkdir()
    arguments = flags(text, run, **SMALL | dict(steps=2, checkpoint_every=1))
    begin(the_program, arguments, run)
    shutil.copytree(run, tmp_path / "begun")
    whole = the_program.run(*arguments, fault=Fault(place, FULL, 0))
    assert whole.returncode == 0 and whole.calls > 150, whole
    shutil.move(run, tmp_path / "whole")
    records, parameters = step_records(tmp_path / "whole"), final_parameters(tmp_path / "whole")[1]
    for at in itertools.count(1):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", run)
        full = the_program.run(*arguments, fault=Fault(place, FULL, at))
        if full.returncode == 0:  # it needed fewer calls, whose number depends on threads
            assert full.calls < at and at > 150, (at, full)
            break
        assert said_in_one_sentence(full), (at, full)
        done = the_program.run(*arguments)
        assert done.returncode == 0, (at, full, done)
        assert step_records(run) == records, at
        assert_same_bits(final_parameters(run)[1], parameters)
        assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes(), at
        audited = call("audit", run)
        assert audited.returncode == 0, (at, full, audited.stdout)


def test_a_run_that_finds_no_room_at_its_start_leaves_nothing(the_program, text, tmp_path):
    place, at, existed = tmp_path / "place", 0, False
    arguments = flags(text, place / "run", **SMALL | dict(steps=1))
    while not existed:
        at += 1
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        full = the_program.run(*arguments, fault=Fault(place, FULL, at))
        assert said_in_one_sentence(full), (at, full)
        existed = (place / "run").exists()
        if not existed:
            assert not list(place.iterdir()), at
    assert at > 5
    done = the_program.run(*arguments)
    assert done.returncode == 0 and len(step_records(place / "run")) == 1, done


@pytest.mark.parametrize("command", ["export", "tokenize", "synthesize"])
def test_what_is_written_from_a_run_or_for_it_is_whole_or_absent(command, the_program, text, tmp_path):
    before, place, out = tmp_path / "before", tmp_path / "place", tmp_path / "place" / "out"
    before.mkdir()
    run = place / "run"
    if command != "tokenize":
        short = tmp_path / "short.jsonl"  # of which a model soon learns where a text ends
        short.write_text("".join(json.dumps({"text": "ab"}) + "\n" for _ in range(400)))
        unit = dict(privacy_unit="document", sequence_length=8, steps=40, checkpoint_every=40, learning_rate=0.03)
        done = the_program.run(*flags(short, before / "run", **SMALL | unit | dict(noise_multiplier=0.3)))
        assert done.returncode == 0, done.err
    shutil.copytree(before, place)
    arguments = {
        "export": ["export", f"--workdir={run}", f"--out={out}"],
        "tokenize": ["data", "tokenize", text, "--processes=1", "--sequence_length=16", f"--out={out}"],
        "synthesize": ["synthesize", f"--workdir={run}", f"--out={out}.jsonl", "--num_records=2", "--max_new_tokens=60",
                       "--min_characters=0", "--batch_size=8"],
    }[command]  # fmt: skip
    whole = the_program.run(*arguments, fault=Fault(place, FULL, 0))
    assert whole.returncode == 0 and whole.calls > 3, whole
    names = {str(path.relative_to(place)) for path in place.rglob("*")}
    for at in itertools.count(1):
        shutil.rmtree(place)
        shutil.copytree(before, place)
        full = the_program.run(*arguments, fault=Fault(place, FULL, at))
        if full.returncode == 0:
            assert full.calls < at and at > 3, (at, full)
            break
        assert said_in_one_sentence(full), (at, full)
        done = the_program.run(*arguments)
        assert done.returncode == 0, (at, full, done)
        assert command == "tokenize" or call("audit", run).returncode == 0, (at, full)
        assert {str(path.relative_to(place)) for path in place.rglob("*")} == names, at
