"""The audit of a run directory: epsilon derived again from the ledger alone, and compared with everything else that the
folder holds.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from accounting import run_files
from accounting.accountant import Accountant
from accounting.audit import (
    canary_checks,
    document_checks,
    export_checks,
    folder_checks,
    ledger_checks,
    metrics_checks,
    seal_checks,
    secrecy_checks,
)
from accounting.audit.canary_checks import Measured
from accounting.audit.findings import AuditResult, Finding
from accounting.empirical import protocol
from accounting.empirical.protocol import Assessment
from accounting.errors import InputError
from accounting.ledger import chain as ledger_lib
from accounting.ledger import events
from accounting.ledger import executed as executed_lib
from accounting.ledger.executed import Executed
from accounting.ledger.seals import AuditKey
from accounting.report.spending import Spent, spent
from accounting.rounding import round_up


def audit(
    workdir: pathlib.Path,
    checkpoints: Sequence[dict[str, Any]],
    exports: Sequence[pathlib.Path] = (),
    accountant: Callable[..., Accountant] = Accountant,
    head: str | None = None,
    required: AuditKey | None = None,
    measured: Measured | None = None,
) -> AuditResult:
    """Checks a run directory and returns what does not agree. It writes nothing; the folder may be a moved copy.

    Args:
      checkpoints: each checkpoint of the folder as a dict: `step` (of its folder), `meta` (its JSON item),
        `optimizer_count` (counted in its state), `parameters_sha256` (of its state), or `step` and `error` where it
        cannot be read.
      exports: exported folders to check besides those inside the run's.
      accountant: what derives epsilon, from mechanisms.
      head: hash of a line that was deposited elsewhere, and must lie on this chain.
      required: key from elsewhere under which the ledger must be sealed.
      measured: what was found of the run's canaries.

    Raises:
      InputError: the folder is no run, or an export is no export.
    """
    for folder in exports:
        if not export_checks.weight_files(folder):
            raise InputError(f"{folder} is no exported model: it has no *{run_files.WEIGHTS_SUFFIX}")
    names = [*run_files.PUBLIC_FILES[:3], run_files.CHECKPOINTS]
    if not workdir.is_dir() or not any((workdir / name).exists() for name in names):
        raise InputError(f"{workdir} is no run directory: it has none of {', '.join(names)}")
    if not (workdir / run_files.LEDGER).exists() and export_checks.weight_files(workdir):
        raise InputError(f"{workdir} is an exported model: give the run that it comes from, and `export`={workdir}")
    return _Audit(workdir, accountant, head, required, measured or Measured()).run(checkpoints, exports)


class _Audit:
    def __init__(
        self,
        workdir: pathlib.Path,
        accountant: Callable[..., Accountant],
        head: str | None,
        required: AuditKey | None,
        measured: Measured,
    ) -> None:
        self.workdir, self.head, self.required, self.measured = workdir, head, required, measured
        self.findings: list[Finding] = []
        self.notices: list[str] = []
        self._accountant = functools.lru_cache(maxsize=16)(accountant)

    def run(self, checkpoints: Sequence[dict[str, Any]], exports: Sequence[pathlib.Path]) -> AuditResult:
        lines, executed = self._ledger()
        self._files(lines, executed)
        rederived = None
        if executed is not None:
            # Only InputError becomes a finding: these facts allow no epsilon. Any other error is a bug and propagates.
            try:
                rederived = self._derive(executed).bracket.upper
            except InputError as error:
                self.findings.append(
                    Finding("ledger_edited", run_files.LEDGER, f"no epsilon can be derived from its facts ({error})")
                )
                executed = None
        if executed is not None and rederived is not None:
            self.findings += ledger_checks.budget(executed, rederived)
            if not list(canary_checks.registered(executed, lines)):
                self.findings += canary_checks.contradictions(executed, rederived, self.measured)
            try:
                self._documents(lines, executed)
                self._exports(lines, exports)
            except InputError as error:
                self.findings.append(
                    Finding("ledger_edited", run_files.LEDGER, f"no report can be derived from its facts ({error})")
                )
            self._checkpoints(lines, executed, checkpoints)
        else:
            for name in (run_files.CONFIG, run_files.REPORT):
                self._content(name, required=True)
        return AuditResult(
            findings=tuple(self.findings),
            notices=tuple(self.notices),
            epsilon_reported=self._reported("epsilon"),
            epsilon_rederived=None if rederived is None else round_up(rederived),
            steps=executed.steps if executed else 0,
            finished=bool(executed and executed.finished),
            ledger_head=lines[-1].hash if lines else None,
            seal=executed.declared.get("seal") if executed else None,
            deviations=tuple(executed.deviations) if executed else (),
            empirical=self._empirical(executed),
        )

    def _empirical(self, executed: Executed | None) -> dict[str, Any] | None:
        """The measured bounds, each with its meaning."""
        found = self.measured.assessment
        if found is None or executed is None:
            return None
        shown = _with_meanings(found) | {"significance": executed.declared["audit_protocol"]["significance"]}
        against = self.measured.against
        return shown if against is None else shown | {"against": _with_meanings(against)}

    def _content(self, name: str, *, required: bool) -> bytes | None:
        """A file's bytes; None, and a finding if it is required, where it is missing."""
        path = self.workdir / name
        if path.is_file():
            return path.read_bytes()
        if required:
            self.findings.append(Finding("missing_file", name, "the run has none"))
        return None

    def _reported(self, name: str) -> Any:
        try:
            value = json.loads((self.workdir / run_files.REPORT).read_bytes())[name]
            value = float(value) if name == "epsilon" else value if isinstance(value, str) else None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        return None if value != value else value  # NaN is no epsilon

    def _derive(self, executed: Executed) -> Spent:
        as_planned = executed.is_as_planned and not executed.repeated_steps
        mechanisms = executed.planned if as_planned else executed.mechanisms
        accountant = self._accountant(mechanisms, also=executed.also, claimed=executed.claims_privacy)
        return spent(executed, accountant, self._accountant)

    def _ledger(self) -> tuple[list[ledger_lib.Line], Executed | None]:
        if not (self.workdir / run_files.LEDGER).is_file():
            self.findings.append(Finding("missing_file", run_files.LEDGER, "without it nothing can be re-derived"))
            return [], None
        lines, problems = ledger_lib.inspect(ledger_lib.text_of(self.workdir / run_files.LEDGER))
        self.findings += ledger_checks.chain(problems)
        if self.head is not None:
            self.findings += ledger_checks.deposited(self.head, lines)
            # On a broken chain the hash of a line says nothing of those before it.
            self.notices += ledger_checks.confirmed(self.head, lines) if not problems else ()
        lines, findings = ledger_checks.well_formed(lines)
        self.findings += findings if not problems else ()
        try:
            executed = executed_lib.of([line.record for line in lines])
        except InputError as error:
            self.findings.append(Finding("unparsable", run_files.LEDGER, str(error)))
            return lines, None
        if not problems:
            self.findings += ledger_checks.order(lines)
        self.findings += ledger_checks.mechanism(executed, lines)
        self.findings += ledger_checks.histograms(executed, lines)
        self.findings += canary_checks.registered(executed, lines)
        self.findings += canary_checks.planted(self.workdir, executed, self.measured)
        findings, notices = seal_checks.sealed(self.workdir, executed, lines, self.required)
        self.findings += findings
        # With a head that was deposited elsewhere, nobody has to be told to deposit one.
        self.notices += [notice for notice in notices if self.head is None or notice != seal_checks.NO_KEY]
        return lines, executed

    def _documents(self, lines: list[ledger_lib.Line], executed: Executed) -> None:
        settings = self._content(run_files.CONFIG, required=True)
        if settings is not None:
            self.findings += document_checks.config(settings, executed)
        kinds = {event["kind"] for event in executed.events}
        # A run that was stopped before its first report has none.
        if (content := self._content(run_files.REPORT, required=events.REPORT in kinds)) is not None:
            self.findings += document_checks.reported(content, lines, self._derive, self._accountant)
        self.findings += document_checks.page(
            self._content(run_files.PAGE, required=False), lines, self._reported("statement")
        )
        if (content := self._content(run_files.METRICS, required=events.CHECKPOINT in kinds)) is not None:
            found = list(document_checks.metrics(content, lines, executed.updates, finished=executed.finished))
            known = settings is not None and run_files.digest(settings) == executed.declared["config_sha256"]
            if settings is not None and known and not found and executed.version >= events.PLACES:
                found += metrics_checks.recomputed(content, json.loads(settings), lines, executed, self._accountant)
            self.findings += found
        if not executed.finished:
            self.notices.append(
                f"the run is unfinished: {executed.updates} of {executed.planned.steps} steps are recorded"
                + (", and its report is as old as its last checkpoint" if events.CHECKPOINT in kinds else "")
            )
        if not self.findings:
            self.notices += [*ledger_checks.released_besides(executed), *ledger_checks.places(executed)]

    def _checkpoints(
        self, lines: list[ledger_lib.Line], executed: Executed, checkpoints: Sequence[dict[str, Any]]
    ) -> None:
        for stored in checkpoints:
            self.findings += document_checks.checkpoint(stored, lines, executed.updates)
        known = [event["step"] for event in executed.events if event["kind"] == events.CHECKPOINT]
        present = {stored["step"] for stored in checkpoints}
        # While a run goes on, its last checkpoint may have been lost in a crash; the one before is kept until the next
        # is whole. There may be none before.
        lost = not executed.finished and len(set(known)) == 1
        if known and not executed.finished and known[-1] not in present:
            self.notices.append(
                f"checkpoint {known[-1]} is not here: the run goes on from an earlier one, and executes steps again"
            )
        if known and not lost and not present & set(known[-1:] if executed.finished else known):
            self.findings.append(
                Finding("missing_file", f"{run_files.CHECKPOINTS}/{known[-1]}", "the ledger recorded it last")
            )

    def _exports(self, lines: list[ledger_lib.Line], exports: Sequence[pathlib.Path]) -> None:
        inside = self._exports_inside()
        for folder in [*inside, *(folder for folder in exports if folder not in inside)]:
            name = str(folder.relative_to(self.workdir)) if folder in inside else str(folder)
            self.findings += export_checks.export(folder, name, lines, self._derive, self._accountant)

    def _exports_inside(self) -> list[pathlib.Path]:
        """Folders inside the run's with files of weights."""
        files = folder_checks.other_files(self.workdir)
        places = {path.parent for path in files if path.suffix == run_files.WEIGHTS_SUFFIX}
        return sorted(places - {self.workdir})  # a model beside the run's own files is a stranger among them

    def _files(self, lines: list[ledger_lib.Line], executed: Executed | None) -> None:
        others = folder_checks.other_files(self.workdir)
        exported = {
            digest for line in lines if line.record["kind"] == events.EXPORT for digest in line.record["files"].values()
        }
        self.findings += secrecy_checks.leaks(self.workdir, others, exported)
        self.findings += folder_checks.accounted(self.workdir, lines, executed, self._exports_inside())
        if not run_files.can_read_private(self.workdir):
            self.notices.append(
                "private/ may not be read by this user: keys, permissions and whether a process is training the run"
                " were not checked"
            )
        elif (self.workdir / run_files.PRIVATE).exists():
            self.findings += secrecy_checks.permissions(self.workdir / run_files.PRIVATE)
        else:
            self.notices.append("private/ is not here: permissions and keys were not checked")


def _with_meanings(found: Assessment) -> dict[str, Any]:
    shown = found.as_dict()
    return shown | {
        "bounds": [bound | {"meaning": protocol.BOUNDS[bound["bound"]]} for bound in shown["bounds"]],
        "significance": protocol.SIGNIFICANCE,
    }
