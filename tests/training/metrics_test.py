"""The public metrics: what they say is what the public facts give, to the last digit."""

import dataclasses
import json

import pytest

from accounting import run_files
from accounting.accountant import Accountant
from accounting.audit import metrics_checks
from accounting.ledger import chain, executed
from dpgemma.training import optimizer
from tests.training.forgery import audited, rewrite_chain

CASES = [
    optimizer.Optimization("adamw", 8e-3, warmup, schedule, 0.0, steps)
    for schedule in ("cosine", "linear", "constant")
    for warmup, steps in ((0, 7), (10, 64), (5, 5), (20, 3), (3, 1024))
]


@pytest.mark.parametrize("plan", CASES, ids=str)
def test_the_shown_learning_rate_is_that_of_optax(plan):
    """By the trainer's closed form and by the audit's own; optax computes with float32."""
    theirs = optimizer.learning_rate(plan)
    settings = {name: getattr(plan, name) for name in ("learning_rate", "warmup_steps", "schedule", "steps")}
    for step in range(min(plan.steps, 100)):
        assert optimizer.public_rate(plan, step) == pytest.approx(float(theirs(step)), rel=1e-5)
        assert metrics_checks.learning_rate(settings, step) == pytest.approx(
            optimizer.public_rate(plan, step), rel=1e-8
        )


def hide(number):
    """A change of one row, and of the ledger's records of the file, so that only the values are wrong."""

    def change(workdir):
        path = workdir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[3] = number(rows[3])
        lines = [json.dumps(row) + "\n" for row in rows]
        path.write_text("".join(lines))

        def rewrite(records):
            for record in records:
                if record["kind"] == "checkpoint":
                    record["metrics_sha256"] = run_files.digest("".join(lines[: record["step"]]).encode())
            return records

        rewrite_chain(workdir, rewrite)

    return change


def test_a_row_is_spelt_as_the_program_writes_it(workdir):
    """Rows behind the last checkpoint have no digest in the ledger, so their bytes are what counts."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    settings, known = json.loads((workdir / "config.json").read_text()), records_of(workdir)

    def found(content):
        return list(metrics_checks.recomputed(content.encode(), settings, *known, Accountant))

    assert not found("".join(lines)) and not found("".join(lines) + '{"step": 6, "eps')
    row = lines[2]
    for other in (row.replace("{", '{"epsilon": 3.25, '), row.replace("}", "} "), row.replace(": ", ":", 1)):
        assert found("".join([*lines[:2], other, *lines[3:]])), other


def records_of(workdir):
    lines, _ = chain.inspect((workdir / "ledger.jsonl").read_text())
    return lines, executed.of([line.record for line in lines])


def test_processes_that_ended_before_their_first_step_change_no_row(workdir):
    """Two starts elsewhere after step 4, each stopped at once: the rows of the first place are still there."""
    lines, _ = records_of(workdir)
    start, steps = lines[0].record, [line.record for line in lines if line.record["kind"] == "step"]
    moved = [{"kind": "resume", "step": 4, "environment": "server"}] * 2
    records = [start, *steps, *moved, {"kind": "export", "step": 4, "files": {}}]
    fake = [dataclasses.replace(lines[0], record=record) for record in records]
    settings, content = json.loads((workdir / "config.json").read_text()), (workdir / "metrics.jsonl").read_bytes()
    assert not list(metrics_checks.recomputed(content, settings, fake, executed.of(records), Accountant))
    # Once a step was taken there, its row is another one.
    records = [*records, {**steps[4]}]
    fake = [dataclasses.replace(lines[0], record=record) for record in records]
    assert list(metrics_checks.recomputed(content, settings, fake, executed.of(records), Accountant))


CHANGES = {
    "last digit of the learning rate": lambda row: {**row, "learning_rate": row["learning_rate"] + 1e-11},
    "a digit beyond the last": lambda row: {**row, "learning_rate": row["learning_rate"] + 1e-14},
    # One more in the last digit may be what another machine rounds to.
    "last digit of epsilon": lambda row: {**row, "epsilon": round(row["epsilon"] + 2e-4, 4)},
    "a digit of epsilon beyond the last": lambda row: {**row, "epsilon": row["epsilon"] + 1e-9},
    "a smaller epsilon": lambda row: {**row, "epsilon": round(row["epsilon"] / 2, 4)},
    "an epsilon that is none": lambda row: {**row, "epsilon": "5.31"},
    "another step": lambda row: {**row, "step": 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_number_can_hide_in_the_metrics(name, workdir, capsys):
    hide(lambda row: row)(workdir)
    assert not any(f["kind"] == "metrics_edited" for f in audited(capsys, workdir)[1]["findings"])
    hide(CHANGES[name])(workdir)
    found = audited(capsys, workdir)[1]["findings"]
    assert any(f["kind"] == "metrics_edited" and "line 4" in f["where"] for f in found), found
