"""Ledgers of every format, and what writers and auditors agree on."""

import json
import pathlib
import shutil

import pytest

from accounting.accountant import Accountant
from accounting.audit.audit import audit
from accounting.errors import InputError
from accounting.ledger import events, executed
from accounting.ledger.chain import Ledger
from accounting.mechanism.mechanism import GROUP
from tests.accounting.report_test import records
from tests.training.forgery import write_chain

OF_THIS_FORMAT = {"format": events.FORMAT, "environment": "a laptop", "program": "dpgemma 0", "seal_key": None}


def test_a_ledger_without_a_format_is_of_the_first_and_means_what_it_meant():
    old, new = records(), records()
    new[0] |= OF_THIS_FORMAT
    assert "format" not in old[0]
    before, after = executed.of(old), executed.of(new)
    assert before.planned == after.planned and before.mechanisms == after.mechanisms
    # Facts that the first format did not have are those of plain clipping to a constant norm.
    for name in ("clip_scaling", "clip_quantile", "grid_bits"):
        old[0].pop(name, None)
    first = executed.of(old)
    assert first.planned.clip.sensitivity == before.planned.clip_norm
    # Their sums were floats, of which their reports said nothing; an audit expects what was written.
    assert not first.planned.noise.is_exact and first.deviations == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_ledger_of_this_format_says_whether_its_release_is_exact(version):
    lines = records()
    lines[0] |= OF_THIS_FORMAT
    del lines[0]["grid_bits"]
    with pytest.raises(InputError, match="grid_bits"):
        executed.of(lines)
    assert executed.of([{**lines[0], "format": version}, *lines[1:]]).steps == 100


@pytest.mark.parametrize("version", [0, 7, -1, "2", 2.5, None])
def test_a_ledger_of_another_format_is_refused_in_one_sentence(version):
    with pytest.raises(InputError, match="format"):
        executed.of([{**records()[0], "format": version}, *records()[1:]])


@pytest.mark.parametrize(
    "name", [name for name, fact in events.EVENTS["start"].items() if fact.required and name != "format"]
)
def test_every_required_fact_is_missed_and_every_wrong_type_noticed(name):
    for spoil in (lambda facts: facts.pop(name), lambda facts: facts.update({name: ["a list"]})):
        spoilt = records()
        spoilt[0] |= OF_THIS_FORMAT
        spoil(spoilt[0])
        with pytest.raises(InputError, match=name):
            executed.of(spoilt)


@pytest.mark.parametrize(
    "kind, facts, message",
    [
        ("steps", {"step": 1}, "no event of kind"),
        ("step", {"step": 1, "loss": 2.5}, "no fact loss"),
        ("checkpoint", {"step": "1"}, "step of another type"),
        ("finish", {"step": True}, "step of another type"),
        ("evaluation", {"step": 1, "units": "held_out", "bits_per_byte": 3.1}, "no fact bits_per_byte"),
    ],
)
def test_what_is_no_public_fact_cannot_be_written(kind, facts, message, tmp_path):
    """Pitfall 24: a raw value cannot reach the public ledger by mistake, because its kind has no place for one."""
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError, match=message):
        ledger.append(kind, **facts)
    assert (tmp_path / "ledger.jsonl").read_text() == "" and ledger.length == 0


def written(folder, lines):
    """A run's folder with these records in its ledger, whose chain holds."""
    write_chain(folder / "ledger.jsonl", lines)
    return folder


class Contradicting(Accountant):
    def epsilon(self, delta, steps=None):
        raise ArithmeticError("the Renyi epsilon 1 lies below the loss distribution's lower bound 2")


def test_a_bug_of_ours_is_no_finding_about_a_run(tmp_path):
    """An error of the program ends the audit as an error: it must not accuse somebody of having edited a ledger."""
    folder = written(tmp_path, records())
    assert {finding.kind for finding in audit(folder, []).findings} == {"missing_file", "budget_exceeded"}
    with pytest.raises(ArithmeticError, match="Renyi"):
        audit(folder, [], accountant=Contradicting)


def test_an_impossible_mechanism_is_a_finding(tmp_path):
    impossible = records()
    impossible[0]["clip_norm"] = -1.0
    findings = audit(written(tmp_path, impossible), []).findings
    assert any(finding.kind == "unparsable" and "clip norm" in finding.message for finding in findings)


GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_a_run_of_the_first_format_is_audited_as_before(tmp_path):
    """Its files are those that version 0.1.0 wrote; the checkpoints' facts are as that version's audit read them."""
    folder = shutil.copytree(GOLDEN / "format_1", tmp_path / "run")
    checkpoints = json.loads((GOLDEN / "format_1_checkpoints.json").read_text())
    result = audit(folder, checkpoints)
    assert result.consistent and result.epsilon_reported == result.epsilon_rederived > 0, result.findings
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert "format" not in records[0] and result.steps == sum(record["kind"] == "step" for record in records) > 0
    (folder / "metrics.jsonl").write_text("")
    assert {finding.kind for finding in audit(folder, checkpoints).findings} == {"metrics_edited"}


HOSTILE = [
    pytest.param(10**400, id="huge", marks=pytest.mark.slow),
    *(
        pytest.param(value, marks=pytest.mark.slow)
        for value in (float("nan"), 2**63 - 1, -1, 0, 1e308, "inf", None, True, [], {}, "")
    ),
]


def chained(path):
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("n", "hash")}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize("value", HOSTILE)
def test_no_forged_fact_crashes_the_audit(value, tmp_path):
    """Whatever stands in a ledger or a report under a sound chain, the audit ends with findings and no error."""
    folder = shutil.copytree(GOLDEN / "format_1", tmp_path / "run")
    checkpoints = json.loads((GOLDEN / "format_1_checkpoints.json").read_text())
    original, report = chained(folder / "ledger.jsonl"), json.loads((folder / "report.json").read_text())
    found, kinds = {}, set()
    for place, record in enumerate(original):
        for name in [] if record["kind"] in kinds else set(record) - {"kind"}:
            forged = [dict(line) for line in original]
            forged[place][name] = value
            if name in GROUP:  # one mechanism in the declaration and in every step
                forged = [line | ({name: value} if name in line else {}) for line in forged]
            if repr(forged) != repr(original):
                write_chain(folder / "ledger.jsonl", forged)
                found[record["kind"], name] = audit(folder, checkpoints)
        kinds.add(record["kind"])
    write_chain(folder / "ledger.jsonl", original)
    assert audit(folder, checkpoints).findings == ()
    for name in [name for name in report if repr(report[name]) != repr(value)]:
        (folder / "report.json").write_text(json.dumps({**report, name: value}))
        found["report", name] = audit(folder, checkpoints)
    assert len(found) > 50 and [name for name, result in found.items() if result.consistent] == []


def test_a_raw_value_in_the_start_event_is_found(tmp_path):
    folder = shutil.copytree(GOLDEN / "format_1", tmp_path / "run")
    lines = chained(folder / "ledger.jsonl")
    lines[0]["train_loss"] = 3.2
    found = audit(written(folder, lines), []).findings
    assert any(f.kind == "raw_values_public" and "line 1" in f.where and "train_loss" in f.message for f in found)
