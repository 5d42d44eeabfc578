"""Is the ledger whole, and what did it record?"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.ledger import chain as ledger_lib
from accounting.ledger import events, histogram
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed
from accounting.ledger.history import History

WHERE = run_files.LEDGER
MALFORMED = "malformed"


def well_formed(lines: Sequence[Line]) -> tuple[list[Line], list[Finding]]:
    """Returns (lines, findings). Malformed lines become markers without facts, so later checks can rely on types."""
    kept, findings = [], []
    version = _version(lines)
    for number, line in enumerate(lines, 1):
        start = number == 1 and line.record["kind"] == events.START  # ledger.executed looks at its values
        problem = _surplus(line.record) if start else _malformed(line.record, version)
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


def _version(lines: Sequence[Line]) -> int:
    """The format that the ledger claims; the present one where its claim is no number."""
    claimed = events.version_of(lines[0].record) if lines else None
    return claimed if isinstance(claimed, int) else events.FORMAT


def _malformed(record: dict[str, Any], version: int) -> tuple[str, str] | None:
    kind = record["kind"]
    if kind == events.START or kind not in events.EVENTS:
        return "ledger_edited", "a second start event" if kind == events.START else f"unknown kind of event {kind!r}"
    if surplus := _surplus(record):
        return surplus
    if wrong := events.unsound(kind, _facts(record), version):
        return "ledger_edited", f"a {kind} event without a sound {', '.join(wrong)}"
    return None


def chain(problems: Sequence[ledger_lib.Problem]) -> Iterator[Finding]:
    """What the hash chain shows."""
    for problem in problems:
        yield Finding(problem.kind, f"{WHERE} line {problem.line}", problem.message)


def confirmed(head: str, lines: Sequence[Line]) -> Iterator[str]:
    """A sentence about a head that lies on a chain without problems."""
    for number, line in enumerate(lines, start=1):
        if line.hash == head:
            yield f"the given head is that of line {number} of {len(lines)}: no line up to it was rewritten"


def deposited(head: str, lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether a head that was written down elsewhere lies on the chain: lines may follow it, and none was replaced."""
    if head not in {line.hash for line in lines}:
        yield Finding("head_missing", WHERE, f"no line has the hash {head}: lines up to it were cut off or rewritten")


def order(lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether steps follow one another, no event runs ahead of them, and no step was saved with two states.

    This catches edits under a rewritten chain.
    """
    history = History()
    for number, line in enumerate(lines, 1):
        record, where = line.record, f"{WHERE} line {number}"
        updates = history.updates
        if record["kind"] == events.STEP:
            if record["step"] != updates:
                kind = "ledger_line_repeated" if record["step"] < updates else "ledger_line_removed"
                yield Finding(kind, where, f"step {record['step']} where step {updates} should follow")
        elif record["kind"] != events.START and record.get("step", 0) > updates:
            message = (
                f"a {record['kind']} event at step {record['step']}, but only {updates} steps are recorded before it"
            )
            yield Finding("steps_beyond_ledger", where, message)
        elif record["kind"] == events.CHECKPOINT:
            known = history.state_at(record["step"])
            if known not in (None, record.get("state_sha256")):
                yield Finding(
                    "step_saved_twice",
                    where,
                    f"step {record['step']} was saved with the state {record['state_sha256']} here and with {known}"
                    " before: its noise may have been used twice",
                )
        history.add(record)


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
    if executed.updates > executed.planned.steps:
        yield Finding(
            "steps_beyond_plan", WHERE, f"{executed.updates} steps executed, {executed.planned.steps} declared"
        )


def histograms(executed: Executed, lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether a histogram was released as the start event declares: once, before the first step, or not at all."""
    declared = executed.declared
    wanted = (declared.get("histogram_sha256"), declared.get("histogram_noise"))
    found = [(number, line.record) for number, line in enumerate(lines, 1) if line.record["kind"] == events.HISTOGRAM]
    steps = [number for number, line in enumerate(lines, 1) if line.record["kind"] == events.STEP]
    if wanted != (None, None) and steps and not found:
        yield Finding("ledger_line_removed", WHERE, "a histogram is declared, and no line says that it was released")
    for place, (number, record) in enumerate(found):
        where = f"{WHERE} line {number}"
        if executed.version < events.HISTOGRAMS:
            yield Finding("ledger_edited", where, "ledgers of this format hold no histogram")
        elif problem := histogram.unsound(record, executed.planned.num_units):
            yield Finding("ledger_edited", where, problem)
        elif place > 0:
            yield Finding("mechanism_changed", where, "a second histogram: one at most is released")
        elif (histogram.labels_sha256(record["labels"]), record["noise"]) != wanted:
            yield Finding("mechanism_changed", where, "a histogram with other labels or noise than were declared")
        elif steps and steps[0] < number:
            yield Finding("mechanism_changed", where, "a histogram behind the first step: it is released before")


def budget(executed: Executed, epsilon: float) -> Iterator[Finding]:
    """Whether the executed steps stay within the declared target, but for what rounding on another machine explains."""
    target = executed.declared["epsilon"]
    if epsilon > target * (1 + 1e-6) and not math.isinf(target):
        yield Finding(
            "budget_exceeded", WHERE, f"the executed steps cost epsilon {epsilon:g}, the declared target is {target:g}"
        )


def released_besides(executed: Executed) -> Iterator[str]:
    """What is worth knowing about releases that are no steps."""
    for mechanism in executed.also:
        yield (
            "how many units fall under each of some public labels was released once, with noise of"
            f" {mechanism.noise_multiplier:g} units on each count, and is charged"
        )


def places(executed: Executed) -> Iterator[str]:
    """What is worth knowing about where the run was executed."""
    for step, place in executed.history.lineage[1:]:
        yield f"from step {step} on the run was executed in another environment ({place})"
    if executed.repeated_steps:
        yield (
            f"{executed.repeated_steps} executed steps were lost, and were executed once more with other noise: they"
            " are charged again"
        )
