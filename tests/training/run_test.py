"""Whole runs through the command line, in processes of their own: resumption, crashes, signals, damage, targets."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from accounting.accountant import Accountant
from accounting.ledger import chain as ledger_lib
from accounting.mechanism import dp_sgd
from dpgemma.commands import process
from dpgemma.training.observers import Silent
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings
from tests.training.runs import (
    COMMAND,
    ENVIRONMENT,
    SETTINGS,
    assert_same_bits,
    call,
    copy_of,
    final_parameters,
    flags,
    run,
    step_records,
    step_secrets,
    wait_for,
)


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


def test_a_step_is_in_the_ledger_before_it_is_computed(text, tmp_path):
    trainer = prepare(Settings(**SETTINGS | {"data": str(text), "steps": 3}), str(tmp_path / "run"))
    compute, known = trainer.dp_step, []

    class Watched:
        noiser = compute.noiser

        def compiled(self, *arguments):
            self.step = compute.compiled(*arguments)
            self.memory = self.step.memory
            known.append([record["step"] for record in step_records(tmp_path / "run")])
            return self

        def __call__(self, *arguments):
            known.append([record["step"] for record in step_records(tmp_path / "run")])
            return self.step(*arguments)

    trainer.dp_step = Watched()
    trainer.train()
    assert known == [[], [0], [0, 1], [0, 1, 2]]  # compiling computes nothing


def test_pitfall_9_one_count_of_updates(finished):
    step, _, meta = final_parameters(finished[0])
    assert step == meta["step"] == meta["optimizer_count"] == len(step_records(finished[0]))


def test_running_a_finished_run_again_changes_no_step(finished, text, tmp_path):
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    again = call(*flags(text, workdir))
    assert again.returncode == 0 and again.stdout == finished[1].stdout
    assert_same_bits(before, final_parameters(workdir)[1])
    assert (workdir / "ledger.jsonl").read_text() == (finished[0] / "ledger.jsonl").read_text()


# Writes checkpoints while training goes on, as on accelerators.
MEANWHILE = """
from dpgemma import cli
from dpgemma.training.trainer import Trainer
Trainer.waits_for_checkpoints = False
cli.entry_point()
"""


@pytest.mark.parametrize(
    "kills, steps, command",
    [
        pytest.param(1, 9, COMMAND, marks=pytest.mark.slow),
        pytest.param(20, 120, COMMAND, marks=pytest.mark.slow),
        pytest.param(20, 120, [sys.executable, "-c", MEANWHILE], marks=pytest.mark.slow),
    ],
    ids=["1", "20", "20 meanwhile"],
)
def test_sigkill_at_random_moments_leaves_no_trace(kills, steps, command, text, tmp_path):
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
            [*command, *map(str, flags(text, killed, **settings))], env=ENVIRONMENT, stdout=-3, stderr=-3
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
    assert call("audit", killed).returncode == 0
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


@pytest.mark.slow
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
    assert json.loads((workdir / "ledger.jsonl").read_text().splitlines()[-1])["hash"] in err
    step, _, meta = final_parameters(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert step == meta["optimizer_count"] == report["steps"] == len(step_records(workdir)) > 2
    assert not report["finished"] and report["epsilon"] < report["target_epsilon"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    "a wrong digit of a key": ({}, lambda w: one_digit(w / "private/keys.json", "noise"), "keys.json is damaged"),
    "another name of a setting": (
        {},
        lambda w: edit(w / "config.json", '"mesh"', '"mesi"'),
        "is not the file that",
    ),
    "damaged config": ({}, lambda w: (w / "config.json").write_text("{"), "is not the file that"),
}


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def one_digit(path, name):
    stored = json.loads(path.read_text())
    stored[name] = ("0" if stored[name][0] != "0" else "1") + stored[name][1:]
    path.write_text(json.dumps(stored))


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


def test_a_run_that_is_told_to_stop_at_its_start_takes_no_step(text, tmp_path):
    observer = Signals()
    trainer = prepare(Settings(data=str(text), **SETTINGS, steps=2), str(tmp_path / "run"), observers=[observer])
    assert trainer.train(lambda: True) is None and observer.steps == 0 and not step_records(tmp_path / "run")
    trainer.run.unlock()


@pytest.mark.slow
def test_baseline_is_labelled(text, tmp_path):
    workdir = tmp_path / "run"
    done = call(*flags(text, workdir, epsilon="inf", noise_multiplier=0, clip_norm="inf"))
    assert done.returncode == 0 and "NO PRIVACY" in done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert report["epsilon"] == report["target_epsilon"] == "inf" and report["statement"].startswith("NO PRIVACY")
    assert any("non-private baseline" in d for d in report["deviations"])


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_trace_of_steps_is_private_and_the_run_as_clean_as_without(text, tmp_path):
    done = call(*flags(text, tmp_path / "run", steps=4, model="ladder_20k"), "--profile=2")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/private/trace").rglob("*.xplane.pb"))
    assert call("audit", tmp_path / "run").returncode == 0
