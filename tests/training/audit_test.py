"""`dpgemma audit` on real runs: an untouched one is clean, and every planted tampering is found and named."""

import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess

import pytest
from scipy import optimize

from accounting import conversions, rounding, run_files
from accounting.accountant import Accountant
from accounting.audit.audit import audit
from accounting.ledger import chain as ledger_lib
from accounting.mechanism import dp_sgd
from dpgemma import cli
from dpgemma.training import checkpoint
from tests.training.runs import COMMAND, ENVIRONMENT, call, flags, run, wait_for


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """A finished run with an export inside its folder; never changed."""
    workdir = shutil.copytree(finished[0], tmp_path_factory.mktemp("audited") / "run")
    done = call("export", f"--workdir={workdir}", f"--out={workdir / 'export'}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def workdir(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "elsewhere" / "copy")


def audited(capsys, *arguments):
    """(exit code, JSON result)"""
    capsys.readouterr()
    code = cli.main(["audit", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def rewrite_chain(workdir, change):
    """What somebody who knows the format can do: change the records and seal the whole ledger anew."""
    path = workdir / "ledger.jsonl"
    records = [{k: v for k, v in record.items() if k != "n"} for record in ledger_lib.read(path)]
    write_chain(path, change(records))


def write_chain(path, records):
    """A ledger file with these records, whatever they hold, under a chain without a key: the format, written out."""
    previous, rows = "0" * 64, []
    for number, record in enumerate(records):
        spelt = functools.partial(json.dumps, sort_keys=True, separators=(",", ":"))
        line = {"n": number, **record}
        previous = hashlib.sha256((previous + spelt(line)).encode()).hexdigest()
        rows.append(spelt({**line, "hash": previous}) + "\n")
    path.write_text("".join(rows))


def rewrite_report(workdir, change):
    """Changes report.json, and makes the ledger's record of it and its ledger_head fit."""
    path = workdir / "report.json"
    content = json.loads(path.read_text())
    change(content)
    old = run_files.digest(path.read_bytes())
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text)
    edit(workdir / "ledger.jsonl", old, run_files.digest(text.encode()))
    lines = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in ("n", "hash")} for line in lines]
    write_chain(workdir / "ledger.jsonl", records)


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


def test_interrupted_runs_are_consistent_and_marked_unfinished(text, cache, tmp_path, capsys):
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


def test_a_keyed_ledger_cannot_be_rewritten_without_its_key(text, cache, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert call(*flags(text, workdir, ledger_seal="hmac")).returncode == 0
    code, result = audited(capsys, workdir)
    assert code == 0 and "HMAC" in result["seal"]
    assert "HMAC under a key" in (workdir / "report.html").read_text()
    rewrite_chain(workdir, lambda records: records)
    code, result = audited(capsys, workdir)
    assert code == 1 and "mac_invalid" in {finding["kind"] for finding in result["findings"]}
    # Nor by saying that it never had one.
    rewrite_chain(workdir, lambda records: [{**records[0], "seal": ledger_lib.CHAIN}, *records[1:]])
    code, result = audited(capsys, workdir)
    assert code == 1 and "mac_invalid" in {finding["kind"] for finding in result["findings"]}


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
    kinds = {finding.kind for finding in audit(workdir, []).findings}
    assert "missing_file" not in kinds and "metrics_edited" not in kinds, kinds
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


def step_lines(records):
    return [record for record in records if record["kind"] == "step"]


def change_later_steps(**values):
    def change(records):
        for record in step_lines(records)[3:]:
            record.update(values)
        return records

    return lambda w: rewrite_chain(w, change)


def lines_of(workdir, change):
    path = workdir / "ledger.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def other_runs_ledger(workdir):
    """That of a run of the very same settings."""
    rewrite_chain(workdir, lambda records: [{**records[0], "run_id": "f" * 32}, *records[1:]])


def without_last_steps(records):
    kept = {record["step"] for record in step_lines(records)[:4]}
    return [
        r for r in records if r["kind"] in ("start", "report") or (r.get("step", 0) in kept and r["kind"] != "export")
    ]


def set_report(**values):
    return lambda w: rewrite_report(w, lambda content: content.update(values))


def gaussian_limit(workdir):
    """epsilon by the central limit theorem for subsampled Gaussians, which is tighter than the truth."""
    c = json.loads((workdir / "report.json").read_text())
    mu = c["sampling_probability"] * math.sqrt(c["steps"] * math.expm1(c["noise_multiplier"] ** -2))
    limit = optimize.brentq(lambda e: float(conversions.gaussian_delta(e, mu)) - c["delta"], 0, 50)
    assert limit < c["epsilon_lower_numeric"]
    rewrite_report(workdir, lambda content: content.update(epsilon=round(limit, 4)))


def add_loss_to_metrics(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "loss": 5.5}) + "\n" for row in rows))


def unknown_export(workdir):
    shutil.copytree(workdir / "export", workdir / "release")
    path = workdir / "release/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest_data_file(workdir):
    return max((workdir / "checkpoints/6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


TAMPERINGS = {
    "report: epsilon": (
        lambda w: edit(w / "report.json", '"epsilon": ', '"epsilon": 1'),
        "epsilon_disagrees",
        "report.json epsilon",
    ),
    "report: another accountant, looser": (
        lambda w: rewrite_report(w, lambda c: c.update(epsilon=round(c["cross_check"], 4))),
        "epsilon_disagrees",
        "report.json epsilon",
    ),
    "report: another accountant, tighter": (gaussian_limit, "epsilon_disagrees", "report.json epsilon"),
    "report: units under a rewritten chain": (set_report(num_units=10**6), "report_disagrees", "report.json num_units"),
    "report: statement": (
        lambda w: edit(w / "report.json", "NOT covered", "covered"),
        "report_disagrees",
        "report.json statement",
    ),
    "report: whitespace": (lambda w: edit(w / "report.json", "\n ", "\n  "), "report_edited", "report.json"),
    "report: raw loss": (
        lambda w: edit(w / "report.json", '"finished"', '"loss": 3.2, "finished"'),
        "report_disagrees",
        "json loss",
    ),
    "report: truncated": (lambda w: truncate(w / "report.json"), "unparsable", "report.json"),
    "report: missing": (lambda w: (w / "report.json").unlink(), "missing_file", "report.json"),
    "page: edited": (lambda w: edit(w / "report.html", "ε = ", "ε = 0."), "report_edited", "report.html"),
    "page: missing": (lambda w: (w / "report.html").unlink(), "missing_file", "report.html"),
    "config: batch": (
        lambda w: edit(w / "config.json", '"batch_size": 12', '"batch_size": 13'),
        "config_disagrees",
        "batch_size",
    ),
    "config: learning rate": (lambda w: edit(w / "config.json", "0.008", "0.009"), "config_edited", "config.json"),
    "config: truncated": (lambda w: truncate(w / "config.json"), "unparsable", "config.json"),
    "config: missing": (lambda w: (w / "config.json").unlink(), "missing_file", "config.json"),
    "ledger: number": (
        lambda w: lines_of(w, lambda x: [*x[:2], x[2].replace('"step":1', '"step":9'), *x[3:]]),
        "ledger_edited",
        "line 3",
    ),
    "ledger: removed line": (lambda w: lines_of(w, lambda x: x[:2] + x[3:]), "ledger_line_removed", "line 3"),
    "ledger: repeated line": (lambda w: lines_of(w, lambda x: x[:3] + x[2:]), "ledger_line_repeated", "line 4"),
    "ledger: reordered lines": (
        lambda w: lines_of(w, lambda x: [x[0], x[2], x[1], *x[3:]]),
        "ledger_lines_reordered",
        "line 2",
    ),
    "ledger: last line removed": (lambda w: lines_of(w, lambda x: x[:-1]), "report_edited", "report.json"),
    "ledger: last lines removed": (lambda w: lines_of(w, lambda x: x[:-6]), "ledger_cut", "ledger.jsonl"),
    "ledger: cut off": (lambda w: truncate(w / "ledger.jsonl"), "truncated", "ledger.jsonl"),
    "ledger: missing": (lambda w: (w / "ledger.jsonl").unlink(), "missing_file", "ledger.jsonl"),
    "ledger: garbage": (lambda w: (w / "ledger.jsonl").write_bytes(bytes(range(256))), "unparsable", "ledger.jsonl"),
    "ledger: of another run": (other_runs_ledger, "ledger_foreign", "ledger.jsonl"),
    "ledger: step removed, chain rewritten": (
        lambda w: rewrite_chain(w, lambda r: [*r[:2], *r[3:]]),
        "ledger_line_removed",
        "ledger.jsonl",
    ),
    "ledger: steps repeated, chain rewritten": (
        lambda w: rewrite_chain(w, lambda r: [r[0], r[1], *r[1:]]),
        "ledger_line_repeated",
        "",
    ),
    "ledger: loss in a step": (
        lambda w: rewrite_chain(w, lambda r: [r[0], {**r[1], "loss": 1.0}, *r[2:]]),
        "raw_values_public",
        "ledger",
    ),
    "steps beyond the ledger": (lambda w: rewrite_chain(w, without_last_steps), "steps_beyond_ledger", "checkpoints/6"),
    "noise changed": (change_later_steps(noise_multiplier=0.6), "mechanism_changed", "ledger.jsonl"),
    "sampling changed": (change_later_steps(sampling_probability=0.5), "mechanism_changed", "ledger.jsonl"),
    "cap changed": (change_later_steps(max_batch_size=13), "mechanism_changed", "ledger.jsonl"),
    "metrics: number": (lambda w: edit(w / "metrics.jsonl", 'rate": 0.00', 'rate": 0.01'), "metrics_edited", "metrics"),
    "metrics: loss": (add_loss_to_metrics, "raw_values_public", "metrics.jsonl"),
    "metrics: truncated": (lambda w: truncate(w / "metrics.jsonl"), "metrics_edited", "metrics.jsonl"),
    "metrics: missing": (lambda w: (w / "metrics.jsonl").unlink(), "missing_file", "metrics.jsonl"),
    "checkpoint: count": (
        lambda w: edit(w / "checkpoints/6/meta/metadata", '"optimizer_count": 6', '"optimizer_count": 7'),
        "checkpoint_disagrees",
        "checkpoints/6",
    ),
    "checkpoint: exchanged": (
        lambda w: (shutil.rmtree(w / "checkpoints/6"), shutil.copytree(w / "checkpoints/4", w / "checkpoints/6")),
        "checkpoint_disagrees",
        "checkpoints/6",
    ),
    "checkpoint: truncated": (lambda w: truncate(largest_data_file(w)), "checkpoint_unreadable", "checkpoints/6"),
    "checkpoint: last missing": (lambda w: shutil.rmtree(w / "checkpoints/6"), "missing_file", "checkpoints/6"),
    "report: epsilon as text": (
        lambda w: rewrite_report(w, lambda c: c.update(epsilon=str(c["epsilon"]))),
        "epsilon_disagrees",
        "epsilon",
    ),
    "report: epsilon beyond floats": (set_report(epsilon=10**400), "epsilon_disagrees", "report.json epsilon"),
    "report: statement that is none": (set_report(statement=5), "report_disagrees", "report.json statement"),
    "report: nested without end": (
        lambda w: (w / "report.json").write_text("[" * 100_000),
        "unparsable",
        "report.json",
    ),
    "ledger: no number": (lambda w: edit(w / "ledger.jsonl", '"step":1', '"step":NaN'), "unparsable", "line 3"),
    "ledger: nested without end": (
        lambda w: lines_of(w, lambda x: [*x, "[" * 100_000 + "\n"]),
        "unparsable",
        "ledger.jsonl",
    ),
    "ledger: units beyond floats": (
        lambda w: rewrite_chain(w, lambda r: [{**r[0], "num_units": 10**400}, *r[1:]]),
        "unparsable",
        "ledger",
    ),
    "checkpoint: step as text": (
        lambda w: edit(w / "checkpoints/6/meta/metadata", '"step": 6', '"step": "6"'),
        "checkpoint_unreadable",
        "checkpoints/6",
    ),
    "keys readable by others": (
        lambda w: os.chmod(w / "private/keys.json", 0o644),
        "key_readable",
        "private/keys.json",
    ),
    "private folder open": (lambda w: os.chmod(w / "private", 0o755), "key_readable", "private/"),
    "key in a public file": (
        lambda w: (w / "notes.txt").write_text(json.loads((w / "private/keys.json").read_text())["noise"]),
        "key_readable",
        "notes.txt",
    ),
    "raw losses: copy": (
        lambda w: shutil.copy(w / "private/metrics.jsonl", w / "losses.txt"),
        "raw_values_public",
        "losses.txt",
    ),
    "raw losses: log": (
        lambda w: (w / "train.log").write_text("step 3 training loss: 5.31\n"),
        "raw_values_public",
        "train.log",
    ),
    "export: unknown": (unknown_export, "export_unknown", "release/model.safetensors"),
    "export: card": (
        lambda w: edit(w / "export/README.md", "| epsilon | ", "| epsilon | 0."),
        "model_card_disagrees",
        "export/README.md",
    ),
    "export: card's statement": (
        lambda w: edit(w / "export/README.md", "NOT covered", "covered"),
        "model_card_disagrees",
        "README.md",
    ),
    "export: settings": (lambda w: edit(w / "export/config.json", "96", "97"), "export_edited", "export/config.json"),
    "export: file missing": (lambda w: (w / "export/config.json").unlink(), "missing_file", "export/config.json"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named(name, workdir, capsys):
    tamper, kind, where = TAMPERINGS[name]
    tamper(workdir)
    code, result = audited(capsys, workdir)
    assert code == 1 and not result["consistent"]
    assert any(f["kind"] == kind and where in f["where"] and f["message"] for f in result["findings"]), result[
        "findings"
    ]


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


@pytest.fixture(scope="session")
def summaries(exported):
    return checkpoint.summaries(exported / "checkpoints")


@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_every_number_that_is_edited_is_found(name, workdir, summaries):
    original = (workdir / name).read_text()
    for match in re.finditer(r"(?<=: )-?\d+(\.\d+)?(e-?\d+)?(?=[,\n])", original):
        edited = original[: match.start()] + "7" + match.group() + original[match.end() :]
        (workdir / name).write_text(edited)
        assert not audit(workdir, summaries).consistent, edited[match.start() - 40 : match.end() + 10]


def test_200_random_single_byte_edits_never_pass(workdir, summaries):
    rng = random.Random(11)
    files = {name: (workdir / name).read_bytes() for name in ("ledger.jsonl", "config.json", "report.json")}
    # Half of the edits replace any byte by any other; the rest add, take away or change whitespace.
    for number in range(200):
        name = rng.choice(list(files))
        original = files[name]
        if number % 2:
            place = rng.randrange(len(original))
            edited = (
                original[:place]
                + bytes([rng.choice([b for b in range(256) if b != original[place]])])
                + original[place + 1 :]
            )
        else:
            places = [i for i, byte in enumerate(original) if byte in b" \n:,"]
            place = rng.choice(places)
            space = rng.choice([b" ", b"\n", b"\t", b"\r"])
            edited = original[:place] + space + original[place + (number % 4 == 0) :]
            if edited == original:
                edited = original[:place] + original[place + 1 :]
        (workdir / name).write_bytes(edited)
        result = audit(workdir, summaries)
        assert not result.consistent, (name, place, original[place - 10 : place + 10], edited[place - 10 : place + 10])
        (workdir / name).write_bytes(original)
    assert audit(workdir, summaries).consistent
