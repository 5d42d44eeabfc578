import json
import os
import resource
import subprocess
import sys

import pytest

import dpgemma
from dpgemma import cli
from tests.training.runs import call, last_of_each

TEXT = "Ada came to the ward with a cough and went home well. " * 40


def run(*arguments, timeout=120):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "dpgemma", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("command", ["train", "account", "audit", "sample", "export", "sweep"])
def test_help_answers_at_once_without_jax(command):
    code = (
        "import sys; from dpgemma import cli; code = cli.main([sys.argv[1], '--help']);assert not {'jax', 'numpy',"
        " 'scipy', 'flax', 'orbax'} & set(sys.modules); sys.exit(code)"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processors, whatever else they do meanwhile
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.6
    assert "--workdir" in done.stdout or "--epsilon" in done.stdout


def test_train_help_shows_the_public_defaults(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for line in (
        "such as tiny (the default)",
        "by default 1024 within the model's context, and 128",
        "By default 512, or 1024 for models",
        "--steps (default 160)",
        "--epsilon (default 8.0)",
        "--delta (default 1e-05)",
        "--neighbouring_relation (default zero_out)",
    ):
        assert line in text


def test_a_flag_file_may_be_overruled_and_the_version_is_told(tmp_path, capsys):
    (tmp_path / "plan.flags").write_text("--steps=5\n--batch_size=10\n--num_units=1000\n--noise_multiplier=1\n")
    assert cli.main(["account", f"--flagfile={tmp_path}/plan.flags", "--steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"dpgemma {dpgemma.__version__}\n"


def test_console_script_and_module_are_the_same():
    assert "usage: dpgemma COMMAND" in run("--help").stdout
    assert run("--help").returncode == 0
    assert run().returncode == 2


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


BAD_TRAINING = {
    "unknown preset": (["--model=gemma_9t"], "is no preset"),
    "missing file": (["--data=/nowhere/x.txt"], "no file matches"),
    "empty data": (["--data={tmp}/empty.txt"], "empty"),
    "sequence too long": (["--sequence_length=257"], "exceeds the 256 tokens"),
    "batch above the data": (["--batch_size=4000"], "exceeds the"),
    "unreachable epsilon": (
        ["--epsilon=1e-3", "--delta=1e-12", "--max_batch_size=8", "--batch_size=8"],
        "no noise reaches",
    ),
    "infinite clip norm": (["--clip_norm=inf"], "bounds nobody"),
    "unknown flag": (["--epsilom=3"], "epsilom"),
    "malformed number": (["--epsilon=eight"], "not a number"),
    "not a number": (["--epsilon=nan"], "not a number"),
    "fraction of a step": (["--steps=1.5"], "not a whole number"),
    "no steps": (["--steps=0"], "at least 1"),
    "delta": (["--delta=0"], "--delta"),
    "delta below the noise": (["--delta=1e-25"], "smaller than what the noise can hide in"),
    "epsilon beyond the noise": (["--epsilon=80"], "more than any delta can be stated at"),
    "negative epsilon": (["--epsilon=-1"], "--epsilon"),
    "a flag twice": (["--seed=1", "--seed", "2"], "--seed is given twice"),
    "a switch twice": (["--skip_bad_records", "--noskip_bad_records"], "--skip_bad_records is given twice"),
    "tiny clip norm": (["--clip_norm=1e-9"], "at least 1e-06"),
    "zero clip norm": (["--clip_norm=0"], "clip"),
    "other unit": (["--privacy_unit=household"], "auto|sequence|example"),
    "undeclared units": (["--neighbouring_relation=add_or_remove"], "--num_units"),
    "too few declared": (["--neighbouring_relation=add_or_remove", "--num_units=9"], "more training units than"),
    "mesh": (["--mesh=data:many"], "--mesh"),
    "too many devices": (["--mesh=data:2", "--max_batch_size=9"], "multiple of 2"),
    "missing tokenizer": (["--tokenizer=/nowhere/t.model"], "no tokenizer file"),
    "all held out": (["--holdout_fraction=0.999999"], "held out"),
    "positional": (["epsilon=3"], "--name=value"),
    "choice": (["--optimizer=adam"], "adam"),
    "workdir is something else": (["--workdir={tmp}"], "neither empty nor the folder of a run"),
    "unwritable": (["--workdir=/proc/dpgemma/run"], "disk refused"),
    "workdir below a file": (["--workdir={tmp}/text.txt/run"], "disk refused"),
    "missing data set": (["--data=tfds:no_such_data_set"], "cannot read TFDS"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_is_one_sentence(case, text, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "empty.txt").write_text("")
    changes, message = BAD_TRAINING[case]
    arguments = [
        f"--data={text}",
        f"--workdir={tmp_path}/run",
        "--sequence_length=32",
        "--batch_size=8",
        "--steps=2",
        "--delta=1e-4",
    ]
    assert cli.main(["train", *last_of_each([*arguments, *(c.format(tmp=tmp_path) for c in changes)])]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.startswith("dpgemma: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


PLAN = ["--noise_multiplier=1", "--steps=10", "--batch_size=50", "--num_units=1000"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fly"], "unknown command"),
        (["sample"], "--workdir"),
        (["sample", "--workdir=/nowhere"], "no run directory"),
        (["export", "--workdir=/nowhere"], "--out"),
        (["export", "--workdir=/nowhere", "--out={tmp}/x"], "no run directory"),
        (["export", "--workdir=/nowhere", "--out={tmp}"], "not an empty folder"),
        (["account"], "exactly one"),
        (["account", "--epsilon=8", "--steps=9", "--batch_size=5", "--num_units=99", "--delta=2"], "--delta"),
        (["account", "--epsilon=8", "--steps=10", "--batch_size=500", "--num_units=100"], "at most the 100"),
        (["account", "--noise_multiplier=1", "--steps=10", "--batch_size=0", "--num_units=100"], "--batch_size"),
        (["account", "--compose=/nowhere"], "no ledger.jsonl"),
        (["account", "--compose=/nowhere", "--steps=3"], "drop --steps"),
        (["account", *PLAN, "--plot=/nowhere/x.gif"], "must end in"),
        (["account", *PLAN, "--trials=0.5"], "at least 1"),
        (["account", *PLAN, "--sampler=fixed"], "does not hold for fixed sampling under add_or_remove"),
        (["account", *PLAN, "--batch_multiple=4", "--max_batch_size=90"], "--batch_multiple"),
        (["audit"], "which run to check"),
        (["audit", "/nowhere"], "no run directory"),
    ],
)
def test_other_commands_refuse_bad_input(arguments, message, text, tmp_path, capsys):
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_full_disk_is_one_sentence(tmp_path, text, monkeypatch, capsys):
    from dpgemma.storage import appearing

    def refuse(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr(appearing.os, "rename", refuse)
    assert (
        cli.main(
            [
                "train",
                f"--data={text}",
                f"--workdir={tmp_path}/run",
                "--sequence_length=32",
                "--batch_size=8",
                "--noise_multiplier=1",
            ]
        )
        == 2
    )
    assert "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]  # nothing half-written stays


@pytest.mark.slow
def test_default_workdir_and_declared_units(text, tmp_path, monkeypatch, quick_compiles):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train",
        f"--data={text}",
        "--sequence_length=32",
        "--batch_size=8",
        "--steps=1e0",
        "--noise_multiplier=1",
        "--neighbouring_relation=add_or_remove",
        "--num_units=1e3",
    ]
    first, second = call(*arguments), call(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    (workdir,) = (tmp_path / "runs").iterdir()
    assert len(workdir.name) == 8 and int(workdir.name, 16) >= 0
    report = json.loads((workdir / "report.json").read_text())
    assert (
        report["num_units"] == 1000
        and report["neighbouring_relation"] == "add_or_remove"
        and report["sampling_probability"] == 0.008
    )
    assert "declared by the operator" in report["statement"]
    # pitfall 3: under add/remove no file outside private/ tells how many units there are.
    assert report["held_out_units"] is None and "An undisclosed number" in report["statement"]


def test_account_prints_vaultgemmas_epsilon(capsys):
    arguments = [
        "--num_units=12695312500",
        "--batch_size=517989",
        "--steps=100000",
        "--noise_multiplier=0.614",
        "--delta=1.1e-10",
        "--json",
    ]
    assert cli.main(["account", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 1.70 < result["epsilon_lower_numeric"] <= result["epsilon"] < 1.74 and result["cross_check"] > 3
    assert {
        "delta",
        "noise_multiplier",
        "steps",
        "expected_batch_size",
        "max_batch_size",
        "sampling_probability",
        "num_units",
        "neighbouring_relation",
    } < set(result)
    assert result["neighbouring_relation"] == "add_or_remove" and result["max_batch_size"] is None


@pytest.mark.parametrize(
    "omitted, key",
    [
        ("noise_multiplier", "noise_multiplier"),
        ("steps", "steps"),
        ("batch_size", "expected_batch_size"),
        ("num_units", "num_units"),
    ],
)
def test_account_solves_for_any_one_quantity(omitted, key, capsys):
    plan = {"epsilon": "8", "noise_multiplier": "0.85", "steps": "160", "batch_size": "512", "num_units": "7843"}
    del plan[omitted]
    assert cli.main(["account", "--json", *(f"--{n}={v}" for n, v in plan.items())]) == 0
    result = json.loads(capsys.readouterr().out)
    nominal = {"noise_multiplier": 0.846, "steps": 162, "expected_batch_size": 514, "num_units": 7810}
    assert result["epsilon"] <= 8 and result[key] == pytest.approx(nominal[key], rel=0.02)


def test_account_says_what_a_plan_means(tmp_path, capsys):
    arguments = ["account", *PLAN, "--neighbouring_relation=zero_out", "--batch_multiple=8", "--trials=5", "--tables"]
    assert cli.main([*arguments, "--json", f"--plot={tmp_path / 'plan.svg'}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["max_batch_size"] % 8 == 0 and result["sampler"] == "truncated_poisson"
    assert [group["units"] for group in result["groups"]] == [1, 2, 3, 7] and result["groups"][0]["epsilon"] == result[
        "epsilon"
    ]
    assert all(0 < attack["true_positive_rate"] < 1 for attack in result["attacks"])
    assert 0 < result["membership_advantage"] < 1 and result["gaussian_mu"] > 0
    assert result["epsilon"] < result["epsilon_best_trial"] < 5 * result["epsilon"]
    assert (tmp_path / "plan.svg").read_text().count("<svg") == 1
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "units of one owner" in out
        and "membership advantage" in out
        and "epsilon_best_trial" in out
        and "of a single trial" in out
    )


def test_account_prints_a_table_without_json(capsys):
    assert (
        cli.main(["account", "--epsilon=inf", "--steps=10", "--batch_size=5", "--num_units=100", "--delta=1e-6"]) == 0
    )
    out = capsys.readouterr().out
    assert "noise_multiplier         0   (solved)" in out and "epsilon                  inf" in out


def test_a_reader_that_has_seen_enough_is_no_disk_that_refuses():
    """As `dpgemma account ... | head -1`, whose reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "dpgemma", "account", "--num_units=1000", "--batch_size=10", "--steps=9"]
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(
            [*command, "--noise_multiplier=1"], stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 141 and done.stderr == ""


def test_a_lower_end_that_says_nothing_is_not_printed(capsys):
    flags = ["--num_units=1000", "--batch_size=1000", "--steps=1000000", "--noise_multiplier=20"]
    assert cli.main(["account", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["epsilon"] > 1462 and result["epsilon_lower_numeric"] is None
    assert cli.main(["account", *flags]) == 0
    assert "epsilon_lower_numeric    none" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_of_the_help_is_no_crash():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "dpgemma", "train", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141 and b"Traceback" not in done.stderr
