"""What an audit can find, and its result."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from accounting import run_files

KINDS = {
    "missing_file": "a file of the run is not there",
    "unparsable": "a file or a line is not what the program writes",
    "truncated": "a file is cut off",
    "ledger_edited": "a line of the ledger was changed",
    "ledger_line_removed": "lines of the ledger are missing",
    "ledger_line_repeated": "a line of the ledger stands there twice",
    "ledger_lines_reordered": "lines of the ledger are in another order",
    "ledger_foreign": "the ledger belongs to another run",
    "ledger_cut": "the ledger ends before what other files know of it",
    "head_missing": "a deposited head hash is that of no line",
    "seal_invalid": "a seal was not made with the run's key, or is of another kind than the run's",
    "seal_missing": "the ledger is not sealed under the key that was asked for",
    "mechanism_changed": "sampling, noise or cap changed during the run",
    "step_saved_twice": "the ledger knows two states of one step",
    "steps_beyond_ledger": "more steps were taken than the ledger records",
    "steps_beyond_plan": "more steps were executed than the run declared",
    "budget_exceeded": "the executed steps cost more than the target",
    "config_edited": "config.json is not the one that the run was started with",
    "config_disagrees": "config.json and the ledger state different values",
    "report_edited": "a report is not what the program wrote",
    "report_stale": "a report is older than the ledger's last",
    "report_disagrees": "report.json and the ledger state different values",
    "epsilon_disagrees": "the reported number is not what the executed steps cost",
    "checkpoint_unreadable": "a checkpoint cannot be read",
    "checkpoint_disagrees": "a checkpoint's counters or its place in the ledger do not fit",
    "metrics_edited": "metrics.jsonl is not what the program wrote",
    "file_unknown": "a file is none that the run wrote",
    "export_unknown": "the ledger does not know an exported model",
    "export_edited": "a file of an export is not what the program wrote",
    "model_card_disagrees": "an exported model card states other values than the ledger gives",
    "canaries_disagree": "the planted canaries are not those that the ledger registered",
    "attack_disagrees": "the ledger's attack on the canaries is not what they show",
    "guarantee_contradicted": "an attack on the canaries shows more than was proved",
    "key_readable": "secret keys can be read by others, or lie outside private/",
    "raw_values_public": "raw values of private data lie outside private/",
}

# What cannot come from reading files that a process is writing, because it is seen in one reading of the ledger.
_OF_ONE_READING = frozenset({
    "ledger_edited", "ledger_line_removed", "ledger_line_repeated", "ledger_lines_reordered", "head_missing",
    "mechanism_changed", "step_saved_twice", "steps_beyond_plan", "budget_exceeded", "seal_missing",
    "key_readable", "raw_values_public", "seal_invalid", "unparsable", "ledger_foreign",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that does not agree.

    Attributes:
      kind: one of KINDS.
      where: file, and line or field where that says more.
      message: one sentence: what was found, and what was expected.
    """

    kind: str
    where: str
    message: str

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What an audit found, and what it derived.

    Attributes:
      findings: what does not agree; empty is the goal.
      notices: what was not checked, or is worth knowing.
      epsilon_reported, epsilon_rederived: None where there is none.
      steps: executed steps by the ledger.
      finished: whether the ledger says that the run is.
      ledger_head: hash of its last line; None without a ledger.
      seal: what binds the ledger's lines.
      deviations: of the run from what it should be, as the ledger shows them.
      running: whether a process was training the run meanwhile.
      empirical: the lower bounds of an attack that was measured for this audit.
    """

    findings: tuple[Finding, ...]
    notices: tuple[str, ...]
    epsilon_reported: float | None
    epsilon_rederived: float | None
    steps: int
    finished: bool
    ledger_head: str | None
    seal: str | None
    deviations: tuple[str, ...]
    running: bool = False
    empirical: Mapping[str, Any] | None = None

    def while_running(self) -> "AuditResult":
        """What is left of the result where a process wrote the run's files while they were read."""
        notice = (
            "a process is training this run: files that it writes were not compared with the ledger; audit the run"
            " again when it has ended"
        )
        where = (run_files.LEDGER, run_files.PRIVATE)
        findings = tuple(
            finding
            for finding in self.findings
            if finding.kind in _OF_ONE_READING and (finding.kind != "unparsable" or finding.where.startswith(where))
        )
        return dataclasses.replace(self, findings=findings, notices=(*self.notices, notice), running=True)

    @property
    def consistent(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        return {"consistent": self.consistent, **dataclasses.asdict(self)}

    def _bounds(self) -> list[str]:
        """A line for each lower bound."""
        if self.empirical is None:
            return []
        found = self.empirical
        lines = [
            f"an attack on {found['canaries']} canaries, {found['included']} of them trained on, shows epsilon"
            f" {found['lower_bound']:g} at least; all bounds together are wrong in at most"
            f" {found['significance']:.0%} of runs",
            *_table(found),
        ]
        against = found.get("against")
        if against is not None:
            lines += [
                f"against the reference model, which no protocol named before the run: epsilon"
                f" {against['lower_bound']:g} at least; these bounds are wrong in at most {against['significance']:.0%}"
                " of runs, if this one reference was chosen before its result was seen, and knows nothing of the"
                " canaries",
                *_table(against),
            ]
        return lines

    def text(self) -> str:
        """Returns the result as lines of text for a terminal."""

        def shown(value: Any) -> Any:
            return "none" if value is None else "inf" if not math.isfinite(value) else f"{value:g}"

        state = "finished" if self.finished else "unfinished"
        verdict = "INCONSISTENT" if not self.consistent else "running" if self.running else "consistent"
        lines = [
            f"{verdict}: {state} run, {self.steps} steps, epsilon {shown(self.epsilon_reported)} reported,"
            f" {shown(self.epsilon_rederived)} re-derived from the ledger"
        ]
        lines += self._bounds()
        lines += [f"finding: {finding.kind} in {finding.where}: {finding.message}" for finding in self.findings]
        lines += [f"deviation: {line}" for line in self.deviations]
        lines += [f"notice: {line}" for line in self.notices]
        if self.ledger_head:
            lines.append(f"ledger head {self.ledger_head} ({self.seal})")
        return "\n".join(lines)


def _table(found: Mapping[str, Any]) -> list[str]:
    return [
        f"  {bound['epsilon']:<8g} {bound['score']}, {bound['bound']}: {bound['meaning']}" for bound in found["bounds"]
    ]
