"""Whole runs through the command line, in processes of their own: resumption, crashes, signals, damage, secrets."""

import base64
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from accounting import rounding
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import chain as ledger_lib
from accounting.mechanism import dp_sgd
from dpgemma.commands import process
from dpgemma.privacy.keys import Keys
from dpgemma.training import environment
from dpgemma.training import plan as plan_lib
from dpgemma.training.observers import Silent
from dpgemma.training.prepare import prepare, prepare_with_public_keys
from dpgemma.training.run import RunDirectory, changeable
from dpgemma.training.settings import Settings
from tests.training.runs import COMMAND, ENVIRONMENT, SETTINGS, call, copy_of, flags, run, step_secrets, wait_for

ROOT = pathlib.Path(__file__).parents[2]


def final_parameters(workdir):
    from dpgemma.training import checkpoint

    step, parameters, meta = checkpoint.latest_parameters(workdir / "checkpoints")
    return step, parameters, meta


def step_records(workdir):
    return [
        {k: v for k, v in r.items() if k != "n"}
        for r in ledger_lib.read(workdir / "ledger.jsonl")
        if r["kind"] == "step"
    ]


def assert_same_bits(a, b):
    import jax

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))


def test_run_directory_and_output(finished):
    workdir, done = finished
    assert done.stdout.splitlines()[-1].startswith("held-out ") and done.stdout.count("held-out") == 1
    assert done.stdout.endswith(" bits/byte\n") and len(done.stdout.splitlines()) == 1
    assert {p.name for p in workdir.iterdir()} == {
        "config.json", "ledger.jsonl", "report.json", "report.html", "metrics.jsonl", "checkpoints", "private",
    }  # fmt: skip
    report, config = (
        json.loads((workdir / "report.json").read_text()),
        json.loads((workdir / "config.json").read_text()),
    )
    assert report["epsilon"] <= report["target_epsilon"] + 1e-4 and report["finished"] and report["deviations"] == []
    assert report["steps"] == config["steps"] == 6 == len(step_records(workdir))
    assert report["num_units"] + report["held_out_units"] == -(
        -(len((pathlib.Path(config["data"])).read_bytes()) + 1) // 32
    )
    assert config["noise_multiplier"] == report["noise_multiplier"] == 1.0
    kinds = [r["kind"] for r in ledger_lib.read(workdir / "ledger.jsonl")]
    assert kinds[0] == "start" and kinds[-3:] == ["evaluation", "finish", "report"] and kinds.count("checkpoint") == 3


def test_pitfall_1_batches_are_the_accounted_samplers(finished):
    from dpgemma.privacy.samplers import PoissonSampler

    workdir, _ = finished
    report, key = json.loads((workdir / "report.json").read_text()), step_secrets(workdir)["sampling"]
    sampler = PoissonSampler(report["num_units"], report["sampling_probability"], report["max_batch_size"])
    drawn = [json.loads(line)["units"] for line in (workdir / "private/metrics.jsonl").read_text().splitlines()]
    assert drawn == [len(sampler.draw(key, t)) for t in range(6)]
    for record in step_records(workdir):
        assert {name: record[name] for name in ("sampling_probability", "noise_multiplier", "max_batch_size")} == {
            name: report[name] for name in ("sampling_probability", "noise_multiplier", "max_batch_size")
        }


def test_pitfall_9_one_count_of_updates(finished):
    step, _, meta = final_parameters(finished[0])
    assert step == meta["step"] == meta["optimizer_count"] == len(step_records(finished[0]))


def test_pitfall_15_keys_are_private_and_appear_nowhere_else(finished):
    workdir, done = finished
    private = workdir / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "keys.json").stat().st_mode) == 0o600
    secrets = json.loads((private / "keys.json").read_text())
    assert all(len(bytes.fromhex(value)) == 32 for value in secrets.values()) and len(set(secrets.values())) == 5
    needles = [
        form for value in secrets.values() for form in (value.encode(), value.upper().encode(), bytes.fromhex(value))
    ]
    for path in workdir.rglob("*"):
        if path.is_file() and private not in path.parents:
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path
    assert not any(value in done.stdout + done.stderr for value in secrets.values())


def written_forms(key):
    """Ways in which pieces of a key could be written: any 8 of its bytes are enough to be found."""
    text = key.hex()
    yield from (text[i : i + 16].encode() for i in range(0, len(text) - 15, 2))
    yield from (text[i : i + 16].upper().encode() for i in range(0, len(text) - 15, 2))
    yield from (key[i : i + 8] for i in range(len(key) - 7))
    for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.b32encode):
        for skip in range(5):
            whole = encode(key[skip:]).rstrip(b"=")
            yield from (whole[i : i + 12] for i in range(0, len(whole) - 12, 4))
    for order in ("big", "little"):
        yield str(int.from_bytes(key, order))[:20].encode()
        yield from (str(int.from_bytes(key[i : i + 8], order)).encode() for i in range(0, len(key), 8))
    yield from (sep.join(map(str, key[:6])).encode() for sep in (",", ", ", " "))
    yield key[::-1].hex()[:16].encode()


def test_pitfall_15_no_piece_of_a_key_stands_in_any_public_file_in_any_form(finished):
    workdir, done = finished
    secrets = [bytes.fromhex(value) for value in json.loads((workdir / "private/keys.json").read_text()).values()]
    forms = {form for key in secrets for form in written_forms(key) if len(form) >= 8}
    for path in workdir.rglob("*"):
        if path.is_file() and workdir / "private" not in path.parents:
            content = path.read_bytes()
            assert not [form for form in forms if form in content], path
    assert not [form for form in forms if form in (done.stdout + done.stderr).encode()]


# Everything that a run says where standard error is no terminal.
SAID = re.compile(
    r"tiny in \S+: \d+ units, batch 12 \(at most 48\), 6 steps, epsilon [\d.]+ at delta 0\.0001, noise multiplier 1,"
    r" clip norm 1"
    r"|--clipping=example_scan --microbatch_size=1 \(the run is too short for a trial to pay\)"
    r"|(\r? *\d+%\|.{10}\| step \d/6 \[[\d:]+<[\d:?]+\](, epsilon [\d.]+/[\d.]+, \d+ units/s, \d+ tokens/s)?)+"
    r"|ledger head [0-9a-f]{64}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
)


def test_all_that_is_said_is_known_and_public(finished):
    _, done = finished
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and not [line for line in lines if not SAID.fullmatch(line)]


def test_pitfall_24_no_raw_value_outside_private(finished):
    workdir, done = finished
    public = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [set(m) for m in public] == [{"step", "epsilon", "learning_rate"}] * 6
    private = [json.loads(line) for line in (workdir / "private/metrics.jsonl").read_text().splitlines()]
    assert all(m["loss"] > 0 and m["units"] >= 0 for m in private)
    assert "loss" not in done.stderr  # standard error is no terminal here


def test_running_a_finished_run_again_changes_no_step(finished, text, tmp_path):
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    again = call(*flags(text, workdir))
    assert again.returncode == 0 and again.stdout == finished[1].stdout
    assert_same_bits(before, final_parameters(workdir)[1])
    assert (workdir / "ledger.jsonl").read_text() == (finished[0] / "ledger.jsonl").read_text()


@pytest.mark.parametrize("kills, steps", [(1, 9), pytest.param(20, 120, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_leaves_no_trace(kills, steps, text, tmp_path):
    """Start-up and checkpoint writing included; result and step records are those of a run that was left alone."""
    rng = random.Random(7)
    settings = dict(steps=steps, checkpoint_every=3)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    # One set of keys and one start for both: the second folder is a copy of the first, taken before its first step.
    first = subprocess.Popen(
        [*COMMAND, *map(str, flags(text, undisturbed, **settings))], env=ENVIRONMENT, stdout=-3, stderr=-3
    )
    wait_for(lambda: (undisturbed / "ledger.jsonl").exists(), first)
    first.kill()
    first.wait()
    shutil.rmtree(undisturbed / "checkpoints", ignore_errors=True)
    start = (undisturbed / "ledger.jsonl").read_text().splitlines(keepends=True)[0]
    (undisturbed / "ledger.jsonl").write_text(start)
    shutil.copytree(undisturbed, killed)

    assert run(*flags(text, undisturbed, **settings)).returncode == 0
    during_save = 0
    for kill in range(kills):
        stale, lines = half_written(killed), len((killed / "ledger.jsonl").read_text().splitlines())
        process = subprocess.Popen(
            [*COMMAND, *map(str, flags(text, killed, **settings))], env=ENVIRONMENT, stdout=-3, stderr=-3
        )
        if kill % 4 == 0:
            wait_for(lambda stale=stale: half_written(killed) - stale, process)
        elif kill % 4 == 1:
            time.sleep(rng.uniform(0, 6))  # anywhere, start-up included
        else:
            more = lines + rng.randint(1, 4)
            wait_for(lambda more=more: len((killed / "ledger.jsonl").read_text().splitlines()) >= more, process)
            time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None, "the run ended before its kills: give it more steps"
        process.kill()
        process.wait()
        during_save += bool(half_written(killed) - stale)
    done = run(*flags(text, killed, **settings))
    assert done.returncode == 0, done.stderr
    assert during_save > 0
    assert step_records(killed) == step_records(undisturbed)
    a, b = final_parameters(undisturbed), final_parameters(killed)
    assert a[0] == b[0] == steps and a[2]["optimizer_count"] == b[2]["optimizer_count"] == steps
    assert_same_bits(a[1], b[1])
    assert (killed / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def half_written(workdir):
    """Inodes of the checkpoints that are being written, or were when their process died."""
    found = set()
    for path in (workdir / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_signals_save_and_exit_cleanly(number, text, tmp_path):
    workdir = tmp_path / "run"
    arguments = flags(text, workdir, steps=5000, checkpoint_every=5000)
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(
        lambda: (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text().splitlines()) > 2,
        process,
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "the same command goes on" in err and "Traceback" not in err
    step, _, meta = final_parameters(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert step == meta["optimizer_count"] == report["steps"] == len(step_records(workdir)) > 2
    assert not report["finished"] and report["epsilon"] < report["target_epsilon"]


def test_a_signal_during_the_last_step_is_remembered(text, tmp_path):
    """A signal that comes while a step is taken, here the first of one or of two."""
    settings = dict(data=str(text), **SETTINGS)
    for steps, bits_are_there in ((1, True), (2, False)):
        observer = Signals()
        trainer = prepare(Settings(**settings, steps=steps), str(tmp_path / str(steps)), observers=[observer])
        with process.stop_on_signal() as stopped:
            assert (trainer.train(stopped) is not None) == bits_are_there
            assert stopped() and trainer.first_step == 0 and observer.steps == 1
        trainer.run.unlock()


class Signals(Silent):
    """An observer whose process gets a signal whenever a step has been taken."""

    steps = 0

    def step(self, released, private):
        self.steps += 1
        os.kill(os.getpid(), signal.SIGTERM)


def test_pitfall_15_keys_come_from_the_operating_system(text, tmp_path):
    """Two runs of the same settings in the same process share no key, whatever the seeds of Python, NumPy and jax."""
    found = []
    for name in "ab":
        random.seed(0)
        np.random.seed(0)
        trainer = prepare(Settings(data=str(text), **SETTINGS, steps=1), str(tmp_path / name))
        trainer.run.unlock()
        found.append(json.loads((tmp_path / name / "private/keys.json").read_text()))
        ledger = json.loads((tmp_path / name / "ledger.jsonl").read_text().splitlines()[0])
        assert ledger["secret_keys"] is True and ledger["format"] == 4
    assert len({*found[0].values(), *found[1].values()}) == 10


def test_pitfall_15_keys_are_the_operating_systems_randomness_and_nothing_else():
    """Where the operating system gives only zeros, so are all keys: no clock and no other number has a part in them."""
    code = (
        "import os; os.urandom = lambda n: bytes(n)\n"
        "from dpgemma.privacy.keys import Keys; k = Keys.generate()\n"
        "assert {k.sampling, k.noise, k.holdout, k.fingerprint, k.ledger} == {bytes(32)}"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_setting_but_the_operational_ones_makes_another_run(finished):
    """A run that goes on computes as it began; the mesh may change where sums are whole numbers."""
    directory = RunDirectory(finished[0])
    config, start = directory.config(), ledger_lib.read(finished[0] / "ledger.jsonl")[0]
    facts = {name: start[name] for name in ("num_units", "model", "seal")}
    fingerprint = json.loads(directory.data_file.read_text())["fingerprint"]
    directory.check_resumable(config, fingerprint, facts)
    free = {"checkpoint_every", "keep_checkpoints", "mesh"}
    assert {field.name for field in dataclasses.fields(Settings)} <= set(config)
    for name in config:
        changed = {**config, name: "another value"}
        if name in free:
            directory.check_resumable(changed, fingerprint, facts)
        else:
            with pytest.raises(InputError, match=name):
                directory.check_resumable(changed, fingerprint, facts)
    with pytest.raises(InputError, match="data differ"):
        directory.check_resumable(config, "00" * 32, facts)
    for name in facts:
        with pytest.raises(InputError, match=name):
            directory.check_resumable(config, fingerprint, {**facts, name: "another"})
    assert changeable({**config, "release": "float32"}) == ("checkpoint_every", "keep_checkpoints")


def test_what_a_run_began_with_stays_where_another_machine_finds_it_but_for_its_last_bits():
    """Solved noise depends in its last bit on the processor's way of multiplying; a setting that was changed shows."""
    begun = {"noise_multiplier": 0.5226877415236247, "epsilon": 8.0}
    assert plan_lib._as_begun(0.5226877415236246, begun, "noise_multiplier") == begun["noise_multiplier"]
    assert plan_lib._as_begun(0.52268775, begun, "noise_multiplier") == 0.52268775
    assert plan_lib._as_begun(4.0, begun, "epsilon") == 4.0 and plan_lib._as_begun(4.0, None, "epsilon") == 4.0


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, text, tmp_path):
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    for path in (workdir / "checkpoints/6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run(*flags(text, workdir))
    assert done.returncode == 0, done.stderr
    assert "warning: checkpoint 6 cannot be read" in done.stderr and "resuming at step 4" in done.stderr
    assert_same_bits(before, final_parameters(workdir)[1])
    assert len(step_records(workdir)) == 6


def test_a_disk_that_fills_up_loses_nothing(finished, text, tmp_path):
    workdir = tmp_path / "run"
    # Compiled programs, too, would be larger than a file may be: all are in the cache, since a finished run is there.
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "_", *COMMAND, *map(str, flags(text, workdir))]
    done = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert "checkpoint 2 cannot be written" in done.stderr
    done = run(*flags(text, workdir))
    assert done.returncode == 0, done.stderr
    assert len(step_records(workdir)) == 6 and final_parameters(workdir)[0] == 6


REFUSALS = {
    "other settings": (dict(learning_rate=0.1), None, "learning_rate (0.008 there, 0.1 here)"),
    "other noise": (dict(noise_multiplier=0.9), None, "noise_multiplier (1.0 there, 0.9 here)"),
    "no ledger": ({}, lambda w: (w / "ledger.jsonl").unlink(), "without its ledger"),
    "no keys": ({}, lambda w: (w / "private/keys.json").unlink(), "without its keys"),
    "no config": ({}, lambda w: (w / "config.json").unlink(), "without its config.json"),
    "edited ledger": (
        {},
        lambda w: edit(w / "ledger.jsonl", '"noise_multiplier":1.0', '"noise_multiplier":2.0'),
        "hash chain",
    ),
    "damaged keys": ({}, lambda w: (w / "private/keys.json").write_text("{}"), "keys.json is damaged"),
    "damaged config": ({}, lambda w: (w / "config.json").write_text("{"), "config.json is damaged"),
}


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("case", REFUSALS)
def test_a_folder_that_does_not_fit_is_refused_and_untouched(case, finished, text, tmp_path):
    changes, spoil, message = REFUSALS[case]
    workdir = copy_of(finished, tmp_path)
    if spoil:
        spoil(workdir)
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}
    done = call(*flags(text, workdir, **changes))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}


def test_pitfall_10_other_data_are_refused(finished, text, tmp_path):
    workdir = copy_of(finished, tmp_path)
    other = tmp_path / text.name
    other.write_text(text.read_text().replace("fever", "fewer", 1))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "data": str(other)}))
    done = call(*flags(other, workdir))
    assert done.returncode == 2 and "data differ" in done.stderr


def test_epsilon_beside_noise_ends_the_run_before_the_budget_is_passed(text, tmp_path):
    workdir = tmp_path / "run"
    done = call(*flags(text, workdir, steps=6, epsilon=0.7))
    assert done.returncode == 0, done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert 0 < report["steps"] < 6 and report["epsilon"] <= 0.7 == report["target_epsilon"]

    one_more = dp_sgd(
        report["num_units"],
        12,
        report["max_batch_size"],
        1.0,
        1.0,
        report["steps"] + 1,
        report["neighbouring_relation"],
    )
    assert Accountant(one_more).epsilon(1e-4).upper > 0.7


def test_delta_above_one_over_n_is_a_warning(text, tmp_path):
    done = call(*flags(text, tmp_path / "run", delta=0.1))
    assert done.returncode == 0 and "warning: delta 0.1 is above 1/N" in done.stderr
    assert any("above 1/N" in d for d in json.loads((tmp_path / "run/report.json").read_text())["deviations"])


def test_noise_without_a_target_is_added_and_nothing_is_claimed(text, tmp_path):
    workdir = tmp_path / "run"
    done = call(*flags(text, workdir, epsilon="inf"))
    assert done.returncode == 0, done.stderr
    assert "NO PRIVACY CLAIMED" in done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert report["epsilon"] == "inf" and report["noise_multiplier"] == 1.0
    assert report["statement"].startswith("NO PRIVACY CLAIMED") and any(
        "no guarantee is claimed" in d for d in report["deviations"]
    )
    assert all(record["noise_multiplier"] == 1.0 for record in step_records(workdir))
    # An audit derives the same, and whoever adds runs up is told what was really spent.
    assert call("audit", workdir).returncode == 0
    composed = json.loads(call("account", f"--compose={workdir}", "--json").stdout)
    assert 0 < composed["epsilon"] < 50


def test_pitfall_15_a_run_with_public_keys_claims_nothing_anywhere(text, tmp_path):
    workdir = tmp_path / "run"
    keys = Keys(*(bytes([i]) * 32 for i in range(5)))
    settings = dict(data=str(text), steps=6, epsilon=float("inf"), **SETTINGS)
    with pytest.raises(ValueError, match="needs secret keys"):
        prepare_with_public_keys(Settings(**settings | {"epsilon": 8.0}), keys, str(workdir))
    assert not workdir.exists()
    trainer = prepare_with_public_keys(Settings(**settings), keys, str(workdir))
    trainer.train()
    trainer.run.unlock()
    report = json.loads((workdir / "report.json").read_text())
    assert (
        report["epsilon"] == "inf"
        and "public seed" in report["statement"]
        and any("public seed" in d for d in report["deviations"])
    )
    assert call("audit", workdir).returncode == 0
    # Its noise can be computed by anyone, so it must not count as noise where runs are added up, nor after it went on.
    for again in range(2):
        composed = call("account", f"--compose={workdir}")
        assert composed.returncode == 2 and "public seed" in composed.stderr and not composed.stdout
        if not again:
            assert call(*flags(text, workdir, epsilon="inf", checkpoint_every=40)).returncode == 0


def run_elsewhere(arguments, **variables):
    """In another environment, but the same kind of processor."""
    variables = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX", **variables}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=240
    )


def test_lost_steps_are_not_repeated_elsewhere_beyond_the_target(finished, text, tmp_path):
    """Noise of the same key on sums that are rounded differently could be subtracted; other noise costs."""
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    shutil.rmtree(workdir / "checkpoints")
    ledger = (workdir / "ledger.jsonl").read_bytes()
    refused = run_elsewhere(flags(text, workdir))
    assert refused.returncode == 2 and "costs epsilon" in refused.stderr and "Traceback" not in refused.stderr
    assert (workdir / "ledger.jsonl").read_bytes() == ledger and not (workdir / "checkpoints" / "6").exists()
    assert run(*flags(text, workdir)).returncode == 0
    assert_same_bits(before, final_parameters(workdir)[1])


def test_steps_that_are_repeated_elsewhere_are_charged_again(text, tmp_path):
    """Within a target that has room for them; their number and their cost are in ledger, report, audit and sum."""
    workdir, settings = tmp_path / "run", dict(epsilon=3, steps=5)
    assert call(*flags(text, workdir, **settings)).returncode == 0
    first = json.loads((workdir / "report.json").read_text())
    shutil.rmtree(workdir / "checkpoints/5")
    assert first["steps"] == 5 and first["repeated_steps"] == 0
    moved = run_elsewhere(flags(text, workdir, **settings))
    assert moved.returncode == 0, moved.stderr
    assert "1 steps that were executed in another environment and lost are executed once more" in moved.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert (report["steps"], report["repeated_steps"]) == (6, 1)
    assert [record["step"] for record in step_records(workdir)] == [0, 1, 2, 3, 4, 4]
    six = dp_sgd(
        report["num_units"], 12, 48, 1.0, 1.0, 6, report["neighbouring_relation"], grid_bits=grid_bits_of(workdir)
    )
    assert report["epsilon"] == rounding.round_up(Accountant(six).epsilon(1e-4).upper) > first["epsilon"]
    metrics = [json.loads(line)["epsilon"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 5 and metrics[-1] == report["epsilon"]
    audited = call("audit", workdir, "--json")
    result = json.loads(audited.stdout)
    assert audited.returncode == 0 and result["epsilon_rederived"] == report["epsilon"], result["findings"]
    assert any("charged again" in notice for notice in result["notices"])
    composed = json.loads(call("account", f"--compose={workdir}", "--json").stdout)
    assert composed["steps"] == 6 and rounding.round_up(composed["epsilon"]) == report["epsilon"]


def grid_bits_of(workdir):
    return ledger_lib.read(workdir / "ledger.jsonl")[0]["grid_bits"]


def test_keys_follow_the_whole_way_of_a_run(finished):
    """Wherever a copy goes on, even if it comes back, its keys are no other copy's; without moving they are equal."""
    directory = RunDirectory(finished[0])
    start = ledger_lib.read(finished[0] / "ledger.jsonl")[0]
    ways = (
        [(0, "a")], [(0, "b")], [(0, "a"), (4, "b")], [(0, "a"), (5, "b")], [(0, "a"), (4, "b"), (5, "a")],
        [(0, "a"), (4, "a; continuation 1")], [(0, "a"), (4, "a; continuation 2")],
    )  # fmt: skip
    found = [directory.step_keys(start, tuple(way)) for way in ways]
    assert len({keys.noise for keys in found}) == len({keys.sampling for keys in found}) == len(ways)
    assert directory.step_keys(start, ((0, "a"),)) == found[0]


def test_where_sums_have_no_fixed_order_every_continuation_has_its_own_noise():
    here = "jax 1; NVIDIA H100; matmul precision default"
    fixed = f"{here}, {environment.DETERMINISTIC_SUMS}"
    assert not environment.is_deterministic(here, "gpu")
    assert environment.is_deterministic(fixed, "gpu") and environment.is_deterministic(here, "cpu")


def test_a_run_that_is_told_to_stop_at_its_start_takes_no_step(text, tmp_path):
    observer = Signals()
    trainer = prepare(Settings(data=str(text), **SETTINGS, steps=2), str(tmp_path / "run"), observers=[observer])
    assert trainer.train(lambda: True) is None and observer.steps == 0 and not step_records(tmp_path / "run")
    trainer.run.unlock()


def test_flags_of_the_compiler_are_part_of_the_environment(monkeypatch):
    def described(flags):
        monkeypatch.setenv("XLA_FLAGS", flags)
        return environment.description()

    plain, _, code = described("").rpartition("; code ")
    assert described("--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=4") == f"{plain}; code {code}"
    assert described("--xla_cpu_enable_fast_math=true") == f"{plain}, --xla_cpu_enable_fast_math=true; code {code}"
    # The last of two equal flags holds.
    on, off = f"{environment.DETERMINISTIC_SUMS}", environment.DETERMINISTIC_SUMS.replace("true", "false")
    assert described(f"{on} {off}") != described(f"{off} {on}")
    assert environment.is_deterministic(described(f"{off} {on}"), "gpu")
    assert not environment.is_deterministic(described(f"{on} {off}"), "gpu")


def test_code_and_versions_are_part_of_the_environment(tmp_path):
    """An edited module, or compilation switched off, is another environment; it is asked in processes of their own."""

    def described(place, **variables):
        code = "from dpgemma.training import environment; print(environment.description())"
        variables = {**ENVIRONMENT, "PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu", **variables}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in ("dpgemma", "accounting"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    original = described(tmp_path)
    for version in ("jax", "jaxlib", "numpy", "optax", "flax", "ml_dtypes"):
        assert f"{version} {importlib.metadata.version(version)}" in original
    assert described(ROOT) == original and described(ROOT, JAX_DISABLE_JIT="1") != original
    for edited in ("dpgemma/gemma/blocks/layers.py", "accounting/mechanism/grid.py"):
        content = (tmp_path / edited).read_bytes()
        (tmp_path / edited).write_bytes(content + b"\n")
        assert described(tmp_path) != original
        (tmp_path / edited).write_bytes(content)
    assert described(tmp_path) == original


def test_baseline_is_labelled(text, tmp_path):
    workdir = tmp_path / "run"
    done = call(*flags(text, workdir, epsilon="inf", noise_multiplier=0, clip_norm="inf"))
    assert done.returncode == 0 and "NO PRIVACY" in done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert report["epsilon"] == report["target_epsilon"] == "inf" and report["statement"].startswith("NO PRIVACY")
    assert any("non-private baseline" in d for d in report["deviations"])


def test_sample_and_export(finished, tmp_path):
    import torch
    import transformers

    from dpgemma.gemma import decoder
    from dpgemma.gemma.presets import PRESETS

    workdir = copy_of(finished, tmp_path)
    arguments = ["sample", f"--workdir={workdir}", "--prompt=Ada ", "--max_new_tokens=20"]
    done = run(*arguments)
    assert done.returncode == 0 and done.stdout.startswith("Ada ") and len(done.stdout) > 5
    assert call(*arguments).stdout == done.stdout

    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        exported = call("export", f"--workdir={workdir}", f"--out={out}")
        assert exported.returncode == 0, exported.stderr
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
    assert [r["kind"] for r in ledger_lib.read(workdir / "ledger.jsonl")][-4:] == ["export", "report"] * 2
    assert "differentially private" in (outs[0] / "README.md").read_text()

    model = transformers.AutoModelForCausalLM.from_pretrained(outs[0], attn_implementation="eager").eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = np.random.default_rng(0).integers(4, 260, (2, 30))
    _, parameters, _ = final_parameters(workdir)
    config = PRESETS["tiny"]
    ours = decoder.logits(config, parameters, decoder.hidden_states(config, parameters, ids))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(ids)).logits.numpy(), ours, atol=2e-5)

    refused = call("export", f"--workdir={workdir}", f"--out={outs[0]}")
    assert refused.returncode == 2 and "not an empty folder" in refused.stderr
