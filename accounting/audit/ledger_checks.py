"""Is the ledger whole, and what did it record?"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.ledger import chain as ledger_lib
from accounting.ledger import events
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed

WHERE = run_files.LEDGER
MALFORMED = "malformed"


def well_formed(lines: Sequence[Line]) -> tuple[list[Line], list[Finding]]:
    """Returns (lines, findings). Malformed lines become markers without facts, so later checks can rely on types."""
    kept, findings = [], []
    for number, line in enumerate(lines, 1):
        start = number == 1 and line.record["kind"] == events.START  # ledger.executed looks at its values
        problem = _surplus(line.record) if start else _malformed(line.record)
        if problem:
            kind, message = problem
            findings.append(Finding(kind, f"{WHERE} line {number}", message))
            if not start:
                line = dataclasses.replace(line, record={"n": line.record["n"], "kind": MALFORMED})
        kept.append(line)
    return kept, findings


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("n", "kind")}


def _surplus(record: dict[str, Any]) -> tuple[str, str] | None:
    kind = record["kind"]
    if names := events.unknown(kind, _facts(record)):
        return "raw_values_public", f"a {kind} event holds {', '.join(names)}, which is no public fact of one"
    return None


def _malformed(record: dict[str, Any]) -> tuple[str, str] | None:
    kind = record["kind"]
    if kind == events.START or kind not in events.EVENTS:
        return "ledger_edited", "a second start event" if kind == events.START else f"unknown kind of event {kind!r}"
    if surplus := _surplus(record):
        return surplus
    if wrong := events.unsound(kind, _facts(record)):
        return "ledger_edited", f"a {kind} event without a sound {', '.join(wrong)}"
    return None


def chain(problems: Sequence[ledger_lib.Problem]) -> Iterator[Finding]:
    """What the hash chain shows."""
    for problem in problems:
        yield Finding(problem.kind, f"{WHERE} line {problem.line}", problem.message)


def deposited(head: str, lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether a head that was written down elsewhere lies on the chain: lines may follow it, and none was replaced."""
    if head not in {line.hash for line in lines}:
        yield Finding("head_missing", WHERE, f"no line has the hash {head}: lines up to it were cut off or rewritten")


def order(lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether steps follow one another and no event runs ahead of them; this catches edits under a rewritten chain."""
    steps = 0
    for number, line in enumerate(lines, 1):
        record, where = line.record, f"{WHERE} line {number}"
        if record["kind"] == events.STEP:
            if record["step"] != steps:
                kind = "ledger_line_repeated" if record["step"] < steps else "ledger_line_removed"
                yield Finding(kind, where, f"step {record['step']} where step {steps} should follow")
            steps = record["step"] + 1
        elif record["kind"] != events.START and record.get("step", 0) > steps:
            message = (
                f"a {record['kind']} event at step {record['step']}, but only {steps} steps are recorded before it"
            )
            yield Finding("steps_beyond_ledger", where, message)


def mechanism(executed: Executed, lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether every step was executed as the start event declares."""
    declared = executed.planned.group
    reported = set()
    for number, line in enumerate(lines, 1):
        record = line.record
        if record["kind"] != events.STEP:
            continue
        changed = tuple((name, record[name]) for name in declared if record.get(name) != declared[name])
        if changed and changed not in reported:
            reported.add(changed)
            values = ", ".join(f"{name} {value} (declared {declared[name]})" for name, value in changed)
            yield Finding("mechanism_changed", f"{WHERE} line {number}", f"from step {record['step']} on: {values}")
    if executed.steps > executed.planned.steps:
        yield Finding("steps_beyond_plan", WHERE, f"{executed.steps} steps executed, {executed.planned.steps} declared")


def budget(executed: Executed, epsilon: float) -> Iterator[Finding]:
    """Whether the executed steps stay within the declared target, but for what rounding on another machine explains."""
    target = executed.declared["epsilon"]
    if epsilon > target * (1 + 1e-6) and not math.isinf(target):
        yield Finding(
            "budget_exceeded", WHERE, f"the executed steps cost epsilon {epsilon:g}, the declared target is {target:g}"
        )


def macs(
    executed: Executed, lines: Sequence[Line], key: bytes | None, seal: str | None
) -> tuple[list[Finding], list[str]]:
    """(findings, notices) about the lines' HMACs.

    Args:
      key: of the HMACs, where private/ is here.
      seal: with which the run was started, as private/ remembers it.
    """
    if seal == ledger_lib.KEYED_CHAIN != executed.declared.get("seal"):
        return [
            Finding(
                "mac_invalid",
                WHERE,
                "the run was started with HMACs under its key, and this ledger claims to need none",
            )
        ], []
    if executed.declared.get("seal") != ledger_lib.KEYED_CHAIN:
        return [], ["the ledger's chain has no key: only a head hash deposited elsewhere rules out a rewritten ledger"]
    if key is None:
        return [], ["the ledger's HMACs were not checked: the key in private/keys.json is not here"]
    wrong = ledger_lib.wrong_macs(list(lines), key)
    if not wrong:
        return [], []
    message = f"{len(wrong)} lines have no HMAC of this run's key, the first is line {wrong[0]}"
    return [Finding("mac_invalid", f"{WHERE} line {wrong[0]}", message)], []
