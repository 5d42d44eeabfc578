"""Measurements while a run goes on: where they go, that they change nothing, and how sure they are."""

import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dpgemma.training.evaluation import Measured
from tests.training.runs import assert_same_bits, call, final_parameters, flags, step_secrets

TEXT = "Ada came to the ward with a cough and went home well. Ben stayed for a week, and was seen again. "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT * 40)
    (folder / "eval.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(12)))
    return folder


def events(folder):
    """(tag, value, step) of every figure in a folder of event files, read from their records of length and content."""
    found = []
    for path in folder.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            if folder.name != "tensorboard" and event.summary.value:
                assert event.wall_time == event.step  # no time of a step is told
            found += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
            at += 12 + size + 4
    return found


def test_losses_go_to_private_files_unless_their_data_are_public(data, tmp_path):
    text, more = data / "text.txt", [f"--eval_data={data / 'eval.jsonl'}", "--eval_every=3", "--eval_limit=8"]
    done = call(*flags(text, tmp_path / "a", 6), *more, f"--tensorboard={tmp_path / 'board'}")
    assert done.returncode == 0, done.stderr
    assert "eval.jsonl" not in done.stderr and "nats/" not in done.stderr  # standard error is no terminal here
    log = (tmp_path / "a" / "private" / "log").read_text()
    assert "step 6 of 6: loss " in log and "nats/token" in log and f"after step 3, {data / 'eval.jsonl'}: " in log
    kept = [json.loads(line) for line in (tmp_path / "a" / "private" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [3, 6] and not any(line["public"] for line in kept)
    public, private = events(tmp_path / "board"), events(tmp_path / "a" / "private" / "tensorboard")
    assert {tag for tag, *_ in public} == {"epsilon", "learning_rate"}
    assert {"loss", "evaluation/bits_per_byte"} <= {tag for tag, *_ in private}
    assert [step for tag, _, step in public if tag == "epsilon"] == [1, 2, 3, 4, 5, 6]
    # The last of them is what `dpgemma evaluate` finds.
    done = call("evaluate", f"--workdir={tmp_path / 'a'}", f"--data={data / 'eval.jsonl'}", "--json")
    assert json.loads(done.stdout)["records"] == 12
    (data / "first.jsonl").write_text("".join((data / "eval.jsonl").read_text().splitlines(keepends=True)[:8]))
    done = call("evaluate", f"--workdir={tmp_path / 'a'}", f"--data={data / 'first.jsonl'}", "--json")
    assert json.loads(done.stdout)["bits_per_byte"] == pytest.approx(kept[-1]["bits_per_byte"], rel=1e-5)
    done = call("audit", tmp_path / "a")
    assert done.returncode == 0, done.stdout
    # Declared public, they are shown anywhere.
    public = [*more, "--public_eval_data"]
    done = call(*flags(text, tmp_path / "b", 3), *public, f"--tensorboard={tmp_path / 'other'}")
    assert done.returncode == 0 and f"after step 3, {data / 'eval.jsonl'}: " in done.stderr, done.stderr
    assert "evaluation/bits_per_byte" in {tag for tag, *_ in events(tmp_path / "other")}
    done = call(*flags(text, tmp_path / "c", 3), f"--tensorboard={tmp_path / 'c' / 'board'}")
    assert done.returncode == 2 and "lies in the run's folder" in done.stderr
    done = call(*flags(text, tmp_path / "d", 3), "--public_eval_data")
    assert done.returncode == 2 and "speaks of data that nobody gave" in done.stderr


@pytest.mark.slow
def test_measuring_changes_no_bit_of_the_run(data, tmp_path):
    """A run goes on with other measurements, and its steps are made from the same secrets."""
    workdir = tmp_path / "run"
    done = call(*flags(data / "text.txt", workdir, 4), "--eval_every=1")
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (workdir / "private" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4] and kept[0]["units"] == "held-out units"
    before, secrets = final_parameters(workdir)[1], step_secrets(workdir)
    done = call(*flags(data / "text.txt", workdir, 4), f"--eval_data={data / 'eval.jsonl'}", "--eval_limit=3")
    assert done.returncode == 0, done.stderr
    assert step_secrets(workdir) == secrets
    assert_same_bits(before, final_parameters(workdir)[1])


def test_intervals_are_those_of_the_mean():
    """For many units of one row, the bootstrap's interval is the normal one; false alarms: it is computed by a seed."""
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, 4000)
    measured = Measured(np.arange(4000), {"x": values}, {"x": np.ones(4000)})
    low, high = measured.interval("x", resamples=4000)
    error = values.std() / np.sqrt(4000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_rows_of_a_unit_are_drawn_together():
    """Where the rows of a unit are alike, ten rows each tell no more than one."""
    rng = np.random.default_rng(1)
    values, owner = rng.normal(3, 2, 400), np.repeat(np.arange(400), 10)
    many = Measured(owner, {"x": values[owner]}, {"x": np.ones(4000)})
    single = Measured(np.arange(400), {"x": values}, {"x": np.ones(400)})
    assert many.interval("x") == pytest.approx(single.interval("x"), rel=1e-9)
    assert many.figures() == pytest.approx(single.figures()) and many.units == 400
    few = Measured(np.repeat(np.arange(5), 800), {"x": values[owner]}, {"x": np.ones(4000)})
    assert few.resamples_rows and not many.resamples_rows
