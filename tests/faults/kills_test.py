"""500 processes that are killed: training, tokenising, exporting, sweeping. Most die in place of a call that changes a
file, drawn at random; the others at a moment by the clock.
"""

import json
import random
import shutil
import time

import pytest

from accounting.ledger import chain
from dpgemma.data.text import cache
from tests.experiments.sweeps import GRID, toml
from tests.faults.begun import SMALL, begin
from tests.faults.program import KILL, Fault, kill
from tests.training.runs import assert_same_bits, call, final_parameters, flags, step_records

pytestmark = pytest.mark.slow


def files(folder):
    """Content of every file by its name below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_250_killed_trainings_take_the_steps_of_one(the_program, text, tmp_path):
    """Runs of one start are killed until they end in spite of it, one after the other."""
    rng, place, whole = random.Random(1), tmp_path / "place", tmp_path / "whole"
    begun, run = tmp_path / "begun", place / "run"
    place.mkdir()

    def arguments(workdir):
        return flags(text, workdir, **SMALL | dict(steps=120, checkpoint_every=4))

    def assert_whole():
        assert step_records(run) == step_records(whole)
        ours, theirs = final_parameters(run), final_parameters(whole)
        assert ours[0] == theirs[0] == ours[2]["optimizer_count"] == 120
        assert_same_bits(ours[1], theirs[1])
        for name in ("metrics.jsonl", "config.json", "private/metrics.jsonl", "private/held_out.jsonl"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        audited = call("audit", run)
        assert audited.returncode == 0, audited.stdout
        assert [path.name for path in place.iterdir()] == ["run"]

    begin(the_program, arguments(begun), begun)
    shutil.copytree(begun, whole)
    done = the_program.run(*arguments(whole))
    assert done.returncode == 0, done.err
    shutil.copytree(begun, run)
    ended = dead = 0
    while dead < 250:
        if dead % 5:
            died = the_program.run(*arguments(run), fault=Fault(place, KILL, rng.randint(1, 240)))
        else:
            process = the_program.start(*arguments(run))
            time.sleep(rng.uniform(0, 6))
            kill(process)
            died = the_program.end_of(process)
        dead += died.returncode == -9
        if died.returncode != -9:
            assert died.returncode == 0, (dead, died)
            assert_whole()
            shutil.rmtree(run)
            shutil.copytree(begun, run)
            ended += 1
    done = the_program.run(*arguments(run))
    assert done.returncode == 0, done.err
    assert_whole()
    assert ended >= 3


def test_100_killed_tokenisers_make_the_cache_of_one(the_program, tmp_path):
    rng, data, place = random.Random(2), tmp_path / "data", tmp_path / "place"
    data.mkdir()
    place.mkdir()
    for number in range(5):
        records = [{"text": "".join(rng.choices("abc \N{SNOWMAN}", k=rng.randint(0, 90)))} for _ in range(40)]
        (data / f"{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["data", "tokenize", f"{data}/*", "--sequence_length=16", "--processes=1", "--privacy_unit=document"]
    whole = the_program.run(*given, f"--out={tmp_path / 'whole'}", fault=Fault(tmp_path / "whole", KILL, 0))
    assert whole.returncode == 0, whole.err
    made, dead = 0, 0
    while dead < 100:
        at = rng.randint(1, whole.calls + 2)
        died = the_program.run(*given, f"--out={place / str(made)}", fault=Fault(place, KILL, at))
        dead += died.returncode == -9
        if died.returncode != -9:  # what was left to do took fewer calls
            assert died.returncode == 0, died.err
            made += 1
    done = the_program.run(*given, f"--out={place / str(made)}")
    assert done.returncode == 0 and made > 5
    for number in range(made + 1):
        same = {name: content for name, content in files(place / str(number)).items() if name != "lock"}
        expected = {name: content for name, content in files(tmp_path / "whole").items() if name != "lock"}
        assert cache.FACTS in expected and same == expected


def test_100_killed_exports_leave_the_run_and_the_model_whole(the_program, text, tmp_path):
    rng, place, run = random.Random(3), tmp_path / "place", tmp_path / "place" / "run"
    place.mkdir()
    done = the_program.run(*flags(text, run, **SMALL | dict(steps=3)))
    assert done.returncode == 0, done.err
    steps, parameters = step_records(run), final_parameters(run)[1]
    shutil.copytree(run, tmp_path / "apart")
    whole = the_program.run(
        "export", f"--workdir={tmp_path / 'apart'}", f"--out={tmp_path / 'whole'}", fault=Fault(tmp_path, KILL, 0)
    )
    assert whole.returncode == 0, whole.err
    made, dead = 0, 0
    while dead < 100:
        out = place / f"model{made}"
        at = rng.randint(1, 2 * whole.calls)  # what killed ones left is removed first, which takes calls too
        died = the_program.run("export", f"--workdir={run}", f"--out={out}", fault=Fault(place, KILL, at))
        dead += died.returncode == -9
        if out.exists():
            assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
            expected = files(tmp_path / "whole")
            assert all(content == expected[name] for name, content in files(out).items() if name != "README.md")
            made += 1
        else:
            assert died.returncode == -9, died.err
    assert made > 2
    done = the_program.run("export", f"--workdir={run}", f"--out={place / 'last'}")
    assert done.returncode == 0, done.err
    assert step_records(run) == steps and final_parameters(run)[2]["step"] == 3
    assert_same_bits(final_parameters(run)[1], parameters)
    audited = call("audit", run)
    assert audited.returncode == 0, audited.stdout
    for number in range(made):  # a killed export leaves nothing that the next one to its place does not remove
        assert not list(place.glob(f".model{number}.*")), number


def test_50_killed_sweeps_end_in_the_table_of_one(the_program, text, tmp_path):
    rng = random.Random(4)
    grid = GRID | dict(noise_batch_ratio=[0, "2^-7", "2^-6", "2^-5"], learning_rate=["2^-8", "2^-7"], steps=24)
    config = toml(tmp_path / "grid.toml", text, grid)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = the_program.run("sweep", config, f"--workdir={whole}", "--slots=2")
    assert done.returncode == 0, done.err
    finished: dict = {}
    for _ in range(50):
        process = the_program.start("sweep", config, f"--workdir={killed}", "--slots=2")
        time.sleep(rng.uniform(0.5, 12))
        kill(process)
        now = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/result.json")}
        assert finished.items() <= now.items()
        finished = now
    done = the_program.run("sweep", config, f"--workdir={killed}", "--slots=2")
    assert done.returncode == 0, done.err
    assert (killed / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    for path in killed.glob("runs/*/run/ledger.jsonl"):
        steps = [record["step"] for record in chain.read(path) if record["kind"] == "step"]
        assert steps == list(range(24))
