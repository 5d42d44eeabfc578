"""`dpgemma audit` on real runs: untouched, stopped, killed, moved, or with another run's files among theirs."""

import os
import random
import shutil
import subprocess
import sys

import pytest

from accounting import rounding, run_files
from accounting.accountant import Accountant
from accounting.audit.audit import audit
from accounting.ledger import chain as ledger_lib
from accounting.mechanism import dp_sgd
from dpgemma import cli
from dpgemma.training import checkpoint
from dpgemma.training.run import RunDirectory
from tests.training.forgery import audited, change_later_steps, edit, rewrite_chain
from tests.training.runs import COMMAND, ENVIRONMENT, call, flags, run, wait_for


def test_an_untouched_run_is_clean_wherever_it_lies(exported, workdir, capsys):
    for folder in (exported, workdir):
        code, result = audited(capsys, folder)
        assert code == 0 and result["consistent"] and result["findings"] == [] and result["finished"]
        assert result["epsilon_reported"] == result["epsilon_rederived"] > 0
    assert cli.main(["audit", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("consistent: finished run, 6 steps") and "ledger head" in out
    assert cli.main(["audit", f"--workdir={workdir}"]) == 0


def test_a_copy_for_an_auditor_without_the_private_folder_is_clean(workdir, capsys):
    shutil.rmtree(workdir / "private")
    code, result = audited(capsys, workdir)
    assert code == 0 and any("private/ is not here" in notice for notice in result["notices"])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    for arguments in ([], [tmp_path], [tmp_path / "nowhere"], [tmp_path, tmp_path]):
        assert cli.main(["audit", *map(str, arguments)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_auditor_may_be_kept_from_the_private_folder(workdir, tmp_path):
    """A user who may read everything but private/, as an auditor may be."""
    for path in (tmp_path, *workdir.parents[: len(workdir.parents) - 2], *workdir.rglob("*")):
        if "private" not in path.parts and os.stat(path).st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o055)
    (workdir / "private").chmod(0o700 if os.getuid() == 0 else 0)
    code = (
        "import os, sys; from dpgemma import cli; cli.main(['audit', sys.argv[1]]);"  # everything is imported then
        " os.getuid() or os.seteuid(65534); print('---'); sys.exit(cli.main(['audit', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, workdir], capture_output=True, text=True, timeout=240)
    (workdir / "private").chmod(0o700)
    told = done.stdout.partition("---")[2]
    assert done.returncode == 0 and "private/ may not be read by this user" in told, done.stdout + done.stderr


def test_a_run_that_goes_on_is_said_to_be_running(workdir, capsys):
    """Its files are written one after the other, so they would not agree; those of a finished run do, though the
    process that trained it may still be there.
    """
    trainer = RunDirectory(workdir)
    trainer.lock()
    assert cli.main(["audit", str(workdir)]) == 0
    rewrite_chain(workdir, lambda records: [r for r in records if r["kind"] != "finish"])
    capsys.readouterr()
    assert cli.main(["audit", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("running: unfinished run") and "a process is training this run" in out
    code, result = audited(capsys, workdir)
    assert (code, result["running"], result["consistent"]) == (0, True, True)
    # What no process that trains could have done is found all the same.
    before = (workdir / "ledger.jsonl").read_text()
    edit(workdir / "ledger.jsonl", '"step":0', '"step":9')
    code, result = audited(capsys, workdir)
    assert code == 1 and {finding["kind"] for finding in result["findings"]} == {"ledger_edited"}
    (workdir / "ledger.jsonl").write_text(before.replace("\n", "\nnonsense\n", 1))
    assert audited(capsys, workdir)[0] == 1
    (workdir / "ledger.jsonl").write_text(before)
    trainer.unlock()
    assert cli.main(["audit", str(workdir)]) == 1


def test_an_export_is_not_taken_for_a_run(workdir, capsys):
    assert cli.main(["audit", str(workdir / "export")]) == 2
    assert "is an exported model" in capsys.readouterr().err


def test_a_deposited_head_is_confirmed(workdir, capsys):
    lines = (workdir / "ledger.jsonl").read_text().splitlines()
    head = ledger_lib.inspect("\n".join(lines[:3]) + "\n")[0][-1].hash
    assert cli.main(["audit", str(workdir), f"--head={head}"]) == 0
    out = capsys.readouterr().out
    assert f"the given head is that of line 3 of {len(lines)}" in out and "deposited elsewhere" not in out
    assert cli.main(["audit", str(workdir), f"--head={'0' * 64}"]) == 1
    assert "is that of line" not in capsys.readouterr().out
    # A line before it that was rewritten, under its old hash: the head is there, and proves nothing.
    edit(workdir / "ledger.jsonl", '"step":0', '"step":9')
    assert cli.main(["audit", str(workdir), f"--head={head}"]) == 1
    assert "is that of line" not in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_runs_are_consistent_and_marked_unfinished(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    rng = random.Random(3)
    for lines in (1, 25):
        process = subprocess.Popen(
            [*COMMAND, *map(str, flags(text, workdir, steps=5000))], env=ENVIRONMENT, stdout=-3, stderr=-3
        )
        ledger = workdir / "ledger.jsonl"
        wait_for(
            lambda n=lines, ledger=ledger: (
                ledger.exists() and len(ledger.read_text().splitlines()) >= n + rng.randint(0, 5)
            ),
            process,
        )
        process.kill()
        process.wait()
        code, result = audited(capsys, workdir)
        assert code == 0, result["findings"]
        assert not result["finished"] and any("unfinished" in notice for notice in result["notices"])


def test_what_crashes_leave_behind_is_no_finding(workdir, summaries):
    """A full disk at the first checkpoint; a later one that was lost, and the run stopped before it came so
    far again."""

    def places(records):
        return [(record["kind"], record.get("step")) for record in records]

    rewrite_chain(workdir, lambda records: records[: places(records).index(("checkpoint", 2)) + 1])
    for name in ("export", "checkpoints"):
        shutil.rmtree(workdir / name)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:2]))
    half = workdir / "checkpoints/2.orbax-checkpoint-tmp"
    for name in ("meta.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp-3/d"):
        (half / name).mkdir(parents=True)  # killed before the first file was there
    kinds = {finding.kind for finding in audit(workdir, []).findings}
    assert not kinds & {"missing_file", "metrics_edited", "file_unknown"}, kinds
    (half / "state.orbax-checkpoint-tmp/loss=3.14").mkdir()
    assert "file_unknown" in {finding.kind for finding in audit(workdir, []).findings}
    # The second checkpoint's event stays, the run resumed at 2 and stopped there.
    rewrite_chain(workdir, lambda records: [*records, {"kind": "resume", "step": 0, "environment": "here"}])
    (workdir / "metrics.jsonl").write_text(lines[0])
    kinds = {finding.kind for finding in audit(workdir, []).findings}
    assert "metrics_edited" not in kinds, kinds


def test_a_vocabulary_that_knows_the_word_loss_is_no_leak(workdir):
    from accounting.audit import secrecy_checks

    file = workdir / "export" / "tokenizer.json"
    file.write_text('{"vocab": {"loss": 4681}}')
    exported = run_files.file_digest(file)
    assert [f.kind for f in secrecy_checks.leaks(workdir, [file])] == ["raw_values_public"]
    assert not list(secrecy_checks.leaks(workdir, [file], {exported}))


@pytest.mark.slow
def test_parameters_of_another_run_are_not_taken_for_this_ones(text, workdir, tmp_path, capsys):
    """Those of a baseline without noise, in the place of private ones: same model, same step, and meta as it was."""
    baseline = tmp_path / "baseline"
    assert call(*flags(text, baseline, epsilon="inf", noise_multiplier=0, clip_norm="inf")).returncode == 0
    shutil.rmtree(workdir / "checkpoints/6/state")
    shutil.copytree(baseline / "checkpoints/6/state", workdir / "checkpoints/6/state")
    code, result = audited(capsys, workdir)
    assert code == 1 and any("parameters are not those" in finding["message"] for finding in result["findings"]), (
        result["findings"]
    )
    for command in (
        ["export", f"--workdir={workdir}", f"--out={tmp_path / 'sold'}"],
        ["sample", f"--workdir={workdir}", "--prompt=a"],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2 and "other parameters than it recorded" in capsys.readouterr().err, command
    assert not (tmp_path / "sold").exists()
    done = call(*flags(text, workdir))
    assert done.returncode == 0 and "set aside" in done.stderr and "resuming at step 4" in done.stderr, done.stderr


@pytest.mark.slow
def test_damaged_arrays_are_said_once(workdir):
    """The storage layers would print a traceback for every array that is not read because another cannot be."""
    for path in (workdir / "checkpoints/6/state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    done = run("audit", workdir)
    assert done.returncode == 1 and "checkpoint_unreadable in checkpoints/6" in done.stdout and done.stderr == ""
    done = run("sample", f"--workdir={workdir}", "--prompt=a")
    assert done.returncode == 2 and "cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_large_checkpoint_is_read_in_parts(workdir, summaries):
    assert checkpoint.summaries(workdir / "checkpoints", read_at_once=50_000) == summaries


def test_exports_elsewhere_are_checked_on_request(workdir, tmp_path, capsys):
    shutil.move(workdir / "export", tmp_path / "sold")
    assert audited(capsys, workdir)[0] == 0
    assert audited(capsys, workdir, f"--export={tmp_path / 'sold'}")[0] == 0
    edit(tmp_path / "sold/README.md", "| steps | 6 |", "| steps | 5 |")
    code, result = audited(capsys, workdir, f"--export={tmp_path / 'sold'}")
    assert (
        code == 1
        and result["findings"][0]["kind"] == "model_card_disagrees"
        and "steps" in result["findings"][0]["message"]
    )
    assert cli.main(["audit", str(workdir), f"--export={tmp_path}"]) == 2


def test_changed_noise_is_charged_as_executed(workdir, capsys):
    change_later_steps(noise_multiplier=0.6)(workdir)
    _, result = audited(capsys, workdir)
    facts = ledger_lib.read(workdir / "ledger.jsonl")[0]
    parts = [
        dp_sgd(facts["num_units"], 12, facts["max_batch_size"], noise, 1.0, 3, facts["neighbouring_relation"])
        for noise in (1.0, 0.6)
    ]
    assert (
        result["epsilon_rederived"]
        == rounding.round_up(Accountant(parts).epsilon(facts["delta"]).upper)
        > result["epsilon_reported"]
    )
    assert any(finding["kind"] == "budget_exceeded" for finding in result["findings"])
