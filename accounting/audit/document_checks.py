"""Do config.json, the reports, the metrics, the checkpoints and the exports say what the ledger says?"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.accountant import Accountant
from accounting.audit import own_figures
from accounting.audit.findings import Finding
from accounting.audit.tolerance import is_close, same_rounded
from accounting.ledger import events
from accounting.ledger import executed as executed_lib
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed
from accounting.ledger.history import History
from accounting.report.content import build
from accounting.report.spending import Spent

# Computed numbers of a report: on another machine they may differ in their last bits.
_COMPUTED = ("epsilon", "epsilon_replace_one", "epsilon_lower_numeric", "cross_check")
_ROUNDED = ("epsilon", "epsilon_replace_one")
_CONFIG_NAMES = {"batch_size": "expected_batch_size"}
_CONFIG_FIELDS = (
    "num_units", "batch_size", "max_batch_size", "noise_multiplier", "clip_norm", "steps", "neighbouring_relation",
    "epsilon", "delta",
    "privacy_unit", "sequence_length", "model",
)  # fmt: skip
# Of units that may have several rows, and of records that are left out.
_UNIT_FIELDS = (
    "skip_bad_records",
    "rows_per_unit",
    "rows_kept",
    "user_field",
    "records_without_user",
    "user_sampling",
    "ownership",
)
_METRICS = {"step", "epsilon", "learning_rate"}

Derive = Callable[[Executed], Spent]


def config(content: bytes, executed: Executed) -> Iterator[Finding]:
    where = run_files.CONFIG
    try:
        stored = dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        yield Finding("unparsable", where, "it is no JSON object of a run's settings")
        return
    fields = (*_CONFIG_FIELDS, *_UNIT_FIELDS)
    declared = {name: run_files.encode(executed.declared.get(_CONFIG_NAMES.get(name, name))) for name in fields}
    differing = [name for name in _CONFIG_FIELDS if stored.get(name) != declared[name]]
    # A ledger that does not name one of these says that it has no meaning, or is not so.
    differing += [name for name in _UNIT_FIELDS if (stored.get(name) or None) != (declared[name] or None)]
    declared["histogram_noise"] = executed.declared.get("histogram_noise")
    if stored.get("histogram_noise") != declared["histogram_noise"]:
        differing.append("histogram_noise")
    declared["canaries"] = executed.declared.get("canaries", 0)
    declared["canary_kind"] = executed.declared.get("canary_kind")
    if stored.get("canaries", 0) != declared["canaries"]:
        differing.append("canaries")
    # Where config.json leaves the kind open, it is that of random text.
    elif declared["canaries"] and stored.get("canary_kind") not in (None, declared["canary_kind"]):
        differing.append("canary_kind")
    # Of the list of prompts the ledger knows the SHA-256, and config.json the file's name, which may change.
    declared["prompt_histogram"] = executed.declared.get("histogram_sha256")
    names_one = isinstance(stored.get("prompt_histogram"), str) and stored["prompt_histogram"] != ""
    if not (names_one if declared["prompt_histogram"] else stored.get("prompt_histogram") is None):
        differing.append("prompt_histogram")
    for name in differing:
        yield Finding(
            "config_disagrees", f"{where} {name}", f"{stored.get(name)} there, {declared[name]} in the ledger"
        )
    if not differing and run_files.digest(content) != executed.declared.get("config_sha256"):
        yield Finding("config_edited", where, "its SHA-256 is not the one that the ledger's start event recorded")


def reported(
    content: bytes, lines: Sequence[Line], derive: Derive, accountant: Callable[..., Accountant]
) -> Iterator[Finding]:
    """Yields differences between report.json and the report that the ledger gives up to the line it names."""
    where = run_files.REPORT
    try:
        stored = json.loads(content)
        head, run_id = stored["ledger_head"], stored["run_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        yield Finding("unparsable", where, "it is no JSON object of a report")
        return
    if run_id != lines[0].record.get("run_id"):
        yield Finding(
            "ledger_foreign",
            run_files.LEDGER,
            f"it is the ledger of run {lines[0].record.get('run_id')}, the report's is {run_id}",
        )
        return
    hashes = [line.hash for line in lines]
    if head not in hashes:
        yield Finding(
            "ledger_cut",
            run_files.LEDGER,
            f"the report was written at ledger head {head}, which the ledger does not have",
        )
    known = lines[: hashes.index(head) + 1] if head in hashes else lines
    executed = executed_lib.of([line.record for line in known])
    expected = run_files.encode(_expected(executed, derive(executed), stored, head))
    found = list(_differences(where, stored, expected))
    if not found:
        own = own_figures.figures(known, executed, accountant)
        found += own_figures.disagreements(where, "report_disagrees", run_files.decode(stored).get, own)
    yield from found
    digests = [line.record["files"].get(run_files.REPORT) for line in lines if line.record["kind"] == events.REPORT]
    digest = run_files.digest(content)
    if digest not in digests:
        if not found:
            yield Finding("report_edited", where, "its text is none that the ledger recorded when reports were written")
    elif digest != digests[-1]:
        # A crash between ledger and report leaves the one before; so much is allowed while the run goes on.
        executed = executed_lib.of([line.record for line in lines])
        if executed.finished or digest not in digests[-2:]:
            yield Finding(
                "report_stale",
                where,
                "the ledger knows a later report; the training command of the version that wrote the run restores it",
            )


def _expected(executed: Executed, spent: Spent, stored: dict[str, Any], head: str) -> dict[str, Any]:
    """Returns the report that the ledger gives; it takes over stored epsilons that differ by rounding only."""
    reported, replaced = stored.get("epsilon"), stored.get("epsilon_replace_one")
    if isinstance(reported, float) and same_rounded(reported, spent.bracket.upper):
        spent = dataclasses.replace(spent, bracket=dataclasses.replace(spent.bracket, upper=reported))
    if isinstance(replaced, float) and spent.replaced is not None and same_rounded(replaced, spent.replaced):
        spent = dataclasses.replace(spent, replaced=replaced)
    return build(executed, spent, head)


def _differences(where: str, stored: dict[str, Any], expected: dict[str, Any]) -> Iterator[Finding]:
    for name in [*expected, *(name for name in stored if name not in expected)]:
        have, want = stored.get(name, "nothing"), expected.get(name, "nothing")
        close = name in _COMPUTED and name not in _ROUNDED and is_close(have, want)
        if have == want or close:
            continue
        kind = "epsilon_disagrees" if name in _COMPUTED else "report_disagrees"
        yield Finding(kind, f"{where} {name}", f"{_short(have)} there, {_short(want)} by the ledger")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def page(content: bytes | None, lines: Sequence[Line], statement: str | None) -> Iterator[Finding]:
    """report.html: the one that the ledger recorded last, with the report's statement."""
    import html

    digests = [
        line.record["files"][run_files.PAGE]
        for line in lines
        if line.record["kind"] == events.REPORT and run_files.PAGE in line.record["files"]
    ]
    if content is None:
        if digests:
            yield Finding(
                "missing_file",
                run_files.PAGE,
                "the ledger recorded one; the training command of the version that wrote the run restores it",
            )
        return
    if run_files.digest(content) not in digests[-1:]:
        yield Finding("report_edited", run_files.PAGE, "it is not the page that the ledger recorded last")
    elif statement is not None and html.escape(statement).encode() not in content:
        yield Finding("report_disagrees", run_files.PAGE, "its statement is not that of report.json")


def metrics(content: bytes, lines: Sequence[Line], updates: int, *, finished: bool) -> Iterator[Finding]:
    """Yields findings if metrics.jsonl has other than public keys, or lines other than those the ledger recorded."""
    where = run_files.METRICS
    rows = [row + b"\n" for row in content.split(b"\n")]
    rows[-1] = rows[-1][:-1]
    rows = rows if rows[-1] else rows[:-1]
    for number, row in enumerate(rows, 1):
        try:
            keys = set(json.loads(row))
        except (ValueError, TypeError, RecursionError):  # no JSON, or no object
            if number == len(rows) and not finished and _is_cut_off(row):
                continue  # by a crash; its step is executed again
            yield Finding("unparsable", f"{where} line {number}", "it is no JSON object")
            return
        if keys != _METRICS:
            surplus = sorted(keys - _METRICS)
            kind = "raw_values_public" if surplus else "metrics_edited"
            yield Finding(
                kind,
                f"{where} line {number}",
                f"it holds {', '.join(sorted(keys))}; only {', '.join(sorted(_METRICS))} are public",
            )
            return
    if len(rows) > updates:
        yield Finding("steps_beyond_ledger", where, f"it has {len(rows)} steps, the ledger {updates}")
    for step, digest, is_lost in _known_metrics(lines):
        if is_lost and len(rows) < step:
            continue  # this checkpoint was lost, and the run has not come so far again
        if run_files.digest(b"".join(rows[:step])) != digest:
            yield Finding(
                "metrics_edited",
                where,
                f"its first {step} lines are not those that the ledger recorded at step {step}",
            )
            return


def _is_cut_off(row: bytes) -> bool:
    """Whether it is the beginning of a row as the program writes it."""
    shape = re.sub(rb"[-+.\de]*\d[-+.\de]*", b"#", row)
    whole = [b'{"step": #, "epsilon": %s, "learning_rate": #}' % epsilon for epsilon in (b"#", b'"inf"')]
    return any(text.startswith(shape) for text in whole)


def _known_metrics(lines: Sequence[Line]) -> list[tuple[int, str, bool]]:
    """(step, SHA-256 of the metrics up to it, whether the run went on before it afterwards) of every checkpoint whose
    steps were not executed elsewhere since; what those wrote was replaced.
    """
    history, found = History(), []
    for line in lines:
        record = line.record
        history.add(record)
        if record["kind"] == events.CHECKPOINT:
            found.append((record, history.lineage, history.repeated, False))
        elif record["kind"] == events.RESUME:
            here = history.lineage, history.repeated
            found = [
                (event, lineage, repeated, lost or record["step"] < event["step"])
                for event, lineage, repeated, lost in found
                if event["step"] <= record["step"] or (lineage, repeated) == here
            ]
    return [(event["step"], event["metrics_sha256"], lost) for event, _, _, lost in found]


def checkpoint(stored: dict[str, Any], lines: Sequence[Line], steps: int) -> Iterator[Finding]:
    """One checkpoint, as a dict with `step` (its folder), `meta`, `optimizer_count` (of its state) or `error`."""
    where = f"{run_files.CHECKPOINTS}/{stored['step']}"
    if stored.get("error"):
        yield Finding("checkpoint_unreadable", where, stored["error"])
        return
    meta = stored["meta"]
    sound = isinstance(meta, dict) and set(meta) == {"step", "optimizer_count", "ledger_lines", "ledger_head"}
    if not sound or not all(isinstance(value, int) for name, value in meta.items() if name != "ledger_head"):
        yield Finding("checkpoint_unreadable", where, "its record of step and ledger is damaged")
        return
    counts = {"folder": stored["step"], "record": meta["step"], "recorded count": meta["optimizer_count"]}
    counts["optimizer"] = stored["optimizer_count"]
    if len(set(counts.values())) > 1:
        yield Finding(
            "checkpoint_disagrees", where, "its step counts differ: " + ", ".join(f"{k} {v}" for k, v in counts.items())
        )
    if max(counts.values()) > steps:
        yield Finding(
            "steps_beyond_ledger", where, f"{max(counts.values())} steps were taken, the ledger records {steps}"
        )
    place = meta["ledger_lines"] - 1
    line = lines[place] if 0 <= place < len(lines) else None
    if line is None or line.hash != meta["ledger_head"]:
        message = f"the ledger does not have its head {meta['ledger_head']} at line {place + 1}"
        yield Finding("checkpoint_disagrees", where, message)
    elif line.record["kind"] != events.CHECKPOINT or line.record["step"] != meta["step"]:
        yield Finding(
            "checkpoint_disagrees", where, f"line {place + 1} of the ledger is not the event of this checkpoint"
        )
    elif line.record["parameters_sha256"] != stored["parameters_sha256"]:
        yield Finding("checkpoint_disagrees", where, "its parameters are not those whose SHA-256 the ledger recorded")
    elif "state_sha256" in line.record and line.record["state_sha256"] != stored["state_sha256"]:
        yield Finding(
            "checkpoint_disagrees", where, "its optimizer's state is not the one whose SHA-256 the ledger recorded"
        )
