"""Every planted tampering with a finished run's files is found by `dpgemma audit`, and named."""

import functools
import json
import math
import os
import random
import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from scipy import optimize

from accounting import conversions, run_files
from accounting.accountant import Accountant
from accounting.audit import audit as audit_lib
from tests.training.forgery import (
    audited,
    change_later_steps,
    edit,
    rewrite_chain,
    rewrite_report,
    step_lines,
)

# Many audits of nearly the same run: what one has computed the others need not.
audit = functools.partial(audit_lib.audit, accountant=functools.lru_cache(maxsize=None)(Accountant))


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


def text_behind_the_metrics(workdir):
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 3.14159, "units": [1, 5')


def words_for_seals(workdir):
    def change(lines):
        return [json.dumps({**json.loads(line), "mac": "unit 17 was drawn"}, sort_keys=True) + "\n" for line in lines]

    lines_of(workdir, change)


def unknown_export(workdir):
    shutil.copytree(workdir / "export", workdir / "release")
    path = workdir / "release/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_last_metrics(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


def half_a_line_of_metrics(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])


def largest_data_file(workdir):
    return max((workdir / "checkpoints/6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


def linked_export(workdir):
    (workdir / "release").mkdir()
    (workdir / "release/model.safetensors").symlink_to(workdir / "export/model.safetensors")


def linked_report(workdir):
    content = workdir.parent / "report.json"
    shutil.move(workdir / "report.json", content)
    (workdir / "report.json").symlink_to(content)


def optimizer_state_with_text(workdir):
    """Private text in Adam's first moment; files and ledger, which has no key, are made to fit."""
    place = workdir / "checkpoints/6"
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore((place / "state").absolute())
        moment = state["optimizer_state"][0]["mu"]
        name = next(iter(moment["final_norm"]))
        moment["final_norm"][name] = np.frombuffer(b"fever".ljust(moment["final_norm"][name].nbytes), np.float32)
        shutil.rmtree(place / "state")
        checkpointer.save((place / "state").absolute(), state)
    digest = run_files.folder_digest(place)

    def change(records):
        return [r | ({"files_sha256": digest} if (r["kind"], r.get("step")) == ("stored", 6) else {}) for r in records]

    rewrite_chain(workdir, change)


def saved_twice(workdir):
    def change(records):
        (place,) = (i for i, r in enumerate(records) if (r["kind"], r.get("step")) == ("stored", 6))
        return [*records[: place + 1], {**records[place - 1], "state_sha256": "ab" * 32}, *records[place + 1 :]]

    rewrite_chain(workdir, change)


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
    "metrics: without its last lines": (without_last_metrics, "metrics_edited", "metrics.jsonl"),
    "metrics: truncated": (half_a_line_of_metrics, "unparsable", "metrics.jsonl line 6"),
    "metrics: text behind the last line": (text_behind_the_metrics, "unparsable", "metrics.jsonl line 7"),
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
    "files: another model": (
        lambda w: (w / "pytorch_model.bin").write_bytes(b"weights"),
        "file_unknown",
        "pytorch_model.bin",
    ),
    "files: hidden": (lambda w: (w / ".notes").write_text("private"), "file_unknown", ".notes"),
    "files: link to a model": (linked_export, "file_unknown", "release/model.safetensors"),
    "files: link to a folder": (
        lambda w: (w / "release").symlink_to(w / "export", target_is_directory=True),
        "file_unknown",
        "release",
    ),
    "files: link in a public file's place": (linked_report, "file_unknown", "report.json"),
    "files: a seal of a ledger without one": (
        lambda w: (w / "seal.json").write_text("train loss: 3.14159"),
        "file_unknown",
        "seal.json",
    ),
    "files: an empty folder": (lambda w: (w / "loss=3.14").mkdir(), "file_unknown", "loss=3.14"),
    "checkpoint: an empty folder in it": (
        lambda w: (w / "checkpoints/4/loss=3.14").mkdir(),
        "file_unknown",
        "checkpoints/4/loss=3.14",
    ),
    "ledger: seals outside its chain": (words_for_seals, "seal_invalid", "ledger.jsonl line 1"),
    "files: pipe": (lambda w: os.mkfifo(w / "pipe"), "file_unknown", "pipe"),
    "files: half a file of a run that is finished": (
        lambda w: (w / "metrics.jsonl.tmp").write_text("private"),
        "file_unknown",
        "metrics.jsonl.tmp",
    ),
    "checkpoints: a changed export among them": (
        lambda w: (
            edit(w / "export/README.md", "| epsilon | ", "| epsilon | 0."),
            shutil.move(w / "export", w / "checkpoints/export"),
        ),
        "model_card_disagrees",
        "checkpoints/export/README.md",
    ),
    "checkpoints: losses among them": (
        lambda w: (w / "checkpoints/losses.txt").write_text("5.31"),
        "file_unknown",
        "checkpoints/losses.txt",
    ),
    "checkpoints: half a checkpoint of a run that is finished": (
        lambda w: shutil.copytree(w / "checkpoints/6", w / "checkpoints/6.orbax-checkpoint-tmp"),
        "file_unknown",
        "checkpoints/6.orbax-checkpoint-tmp",
    ),
    "checkpoint: losses in it": (
        lambda w: (w / "checkpoints/6/losses.txt").write_text("5.31"),
        "checkpoint_disagrees",
        "checkpoints/6",
    ),
    "checkpoint: losses in one of its files": (
        lambda w: edit(w / "checkpoints/6/state/commit_success.txt", "success", "success 5.31"),
        "checkpoint_disagrees",
        "checkpoints/6",
    ),
    "checkpoint: optimizer's state, recorded files rewritten": (
        optimizer_state_with_text,
        "checkpoint_disagrees",
        "checkpoints/6",
    ),
    "checkpoint: two states of a step": (saved_twice, "step_saved_twice", "ledger.jsonl"),
    "checkpoint: its files not recorded": (
        lambda w: rewrite_chain(w, lambda r: [x for x in r if (x["kind"], x.get("step")) != ("stored", 6)]),
        "file_unknown",
        "checkpoints/6",
    ),
    "export: a file more": (
        lambda w: (w / "export/pytorch_model.bin").write_bytes(b"weights"),
        "file_unknown",
        "export/pytorch_model.bin",
    ),
    "export: a folder more": (
        lambda w: ((w / "export/more").mkdir(), (w / "export/more/notes.txt").write_text("private")),
        "file_unknown",
        "export/more",
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


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named(name, workdir, capsys):
    tamper, kind, where = TAMPERINGS[name]
    tamper(workdir)
    code, result = audited(capsys, workdir)
    assert code == 1 and not result["consistent"]
    assert any(f["kind"] == kind and where in f["where"] and f["message"] for f in result["findings"]), result[
        "findings"
    ]


@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_every_number_that_is_edited_is_found(name, workdir, summaries):
    original = (workdir / name).read_text()
    for match in re.finditer(r"(?<=: )-?\d+(\.\d+)?(e-?\d+)?(?=[,\n])", original):
        edited = original[: match.start()] + "7" + match.group() + original[match.end() :]
        (workdir / name).write_text(edited)
        assert not audit(workdir, summaries).consistent, edited[match.start() - 40 : match.end() + 10]


@pytest.mark.parametrize("edits", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_random_single_byte_edits_never_pass(edits, workdir, summaries):
    rng = random.Random(11)
    files = {name: (workdir / name).read_bytes() for name in ("ledger.jsonl", "config.json", "report.json")}
    # Half of the edits replace any byte by any other; the rest add, take away or change whitespace.
    for number in range(edits):
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


def test_a_deposited_head_must_lie_on_the_chain(workdir, summaries):
    """Heads move on as lines follow; a chain that was rewritten, or cut before a deposited head, does not have it."""
    lines = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        assert audit(workdir, summaries, head=line["hash"]).consistent
    (finding,) = audit(workdir, summaries, head="ab" * 32).findings
    assert finding.kind == "head_missing"
    other_runs_ledger(workdir)
    assert "head_missing" in {f.kind for f in audit(workdir, summaries, head=lines[-1]["hash"]).findings}
