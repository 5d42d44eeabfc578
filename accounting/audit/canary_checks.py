"""Are a run's canaries those that its ledger registered, and does an attack on them contradict what was proved?"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.audit.tolerance import is_close
from accounting.empirical.protocol import Assessment, Protocol
from accounting.errors import InputError
from accounting.ledger import events
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed

FIELDS = ("canaries", "canary_kind", "canary_repeats", "canary_sha256", "audit_protocol")
# By which two machines may differ in a lower bound: canaries of nearly equal scores change places.
_TOLERANCE = 0.1
_WHERE = run_files.LEDGER


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of a run's canaries outside its ledger.

    Attributes:
      digest: by which the ledger binds canaries, of those in private/; None where there are none.
      unreadable: why those that are there could not be read.
      assessment: of an attack that was measured for this audit.
    """

    digest: str | None = None
    unreadable: str | None = None
    assessment: Assessment | None = None


def attack_of(executed: Executed) -> dict[str, Any] | None:
    """The assessment that the ledger records, if it records one."""
    for event in executed.events:
        if event["kind"] == events.ATTACK:
            found: dict[str, Any] = event["assessment"]
            return found
    return None


def registered(executed: Executed, lines: Sequence[Line]) -> Iterator[Finding]:
    """Whether canaries were registered whole before the first step, and attacked once at most, after the last."""
    declared, where = executed.declared, f"{_WHERE} line 1"
    given = [name for name in FIELDS if name in declared]
    attacks = [line.record for line in lines if line.record["kind"] == events.ATTACK]
    if not given:
        if attacks:
            yield Finding("ledger_edited", _WHERE, "an attack on canaries, and none were registered")
        return
    if len(given) < len(FIELDS) or declared["canaries"] < 1 or executed.version < events.CANARIES:
        yield Finding("ledger_edited", where, "its canaries are not registered as this program does it")
        return
    try:
        protocol = Protocol.of_facts(declared["audit_protocol"])
    except InputError as error:
        yield Finding("ledger_edited", where, str(error))
        return
    if len(attacks) > 1:
        yield Finding("ledger_line_repeated", _WHERE, "a second attack: canaries are attacked once, by the protocol")
    if executed.finished and not attacks and 1 in declared["canary_repeats"]:
        yield Finding("ledger_line_removed", _WHERE, "canaries are registered, and no line says what they showed")
    for record in attacks:
        if problem := _unsound(record["assessment"], protocol, declared["canaries"]):
            yield Finding("ledger_edited", _WHERE, problem)
        elif record["step"] != executed.planned.steps:
            yield Finding("ledger_edited", _WHERE, "an attack before the last step: nothing was registered of it")


def _unsound(found: dict[str, Any], protocol: Protocol, canaries: int) -> str | None:
    """What is wrong with an assessment's form; None where nothing is."""
    wanted = [(score, bound) for score in protocol.scores for bound in protocol.bounds]
    try:
        numbers = [bound["epsilon"] for bound in found["bounds"]] + [found["lower_bound"]]
        sound = (
            set(found) == {"canaries", "included", "lower_bound", "contradicts", "bounds", "roc"}
            and [(bound["score"], bound["bound"]) for bound in found["bounds"]] == wanted
            and all(isinstance(number, float) and 0 <= round(number, 4) == number for number in numbers)
            and found["lower_bound"] == max(numbers)
            and isinstance(found["contradicts"], bool)
            and found["contradicts"] == any(bound["contradicts"] for bound in found["bounds"])
            and 0 <= found["included"] <= found["canaries"] <= canaries
            and set(found["roc"]) == set(protocol.scores)
            and all(_are_rates(rates) for curve in found["roc"].values() for rates in curve.values())
        )
    except (KeyError, TypeError):
        sound = False
    return None if sound else "what an attack showed is not what this program writes"


def _are_rates(rates: Any) -> bool:
    return isinstance(rates, list) and all(isinstance(x, float) and 0 <= round(x, 4) == x <= 1 for x in rates)


def planted(workdir: pathlib.Path, executed: Executed, measured: Measured) -> Iterator[Finding]:
    """Whether private/ holds the registered canaries."""
    if not run_files.can_read_private(workdir) or not (workdir / run_files.KEYS).exists():
        return
    known = executed.declared.get("canary_sha256")
    if measured.unreadable is not None:
        yield Finding("canaries_disagree", run_files.CANARIES, measured.unreadable)
    elif known is None and measured.digest is not None:
        yield Finding("canaries_disagree", run_files.CANARIES, "the run has canaries, and its ledger registers none")
    elif known is not None and measured.digest is None:
        yield Finding("missing_file", run_files.CANARIES, "the ledger registers canaries, and they are not here")
    elif known != measured.digest:
        yield Finding("canaries_disagree", run_files.CANARIES, "they are not those that the ledger registered")


def contradictions(executed: Executed, epsilon: float, measured: Measured) -> Iterator[Finding]:
    """Whether an attack shows more than was proved, and whether the ledger's agrees with one that was measured anew."""
    known, found = attack_of(executed), measured.assessment
    if (known is not None and known["contradicts"]) or (found is not None and found.contradicts):
        shown = max(
            found.epsilon if found is not None and found.contradicts else 0.0,
            known["lower_bound"] if known is not None and known["contradicts"] else 0.0,
        )
        yield Finding(
            "guarantee_contradicted",
            _WHERE,
            f"AN ATTACK ON THE CANARIES SHOWS EPSILON {shown:g} AT LEAST, AND {epsilon:g} WAS PROVED AT MOST: the"
            " program or the machine that trained this model does not do what the proof assumes; release nothing of it",
        )
    if known is not None and found is not None:
        there, here = known["lower_bound"], found.as_dict()["lower_bound"]
        if not (is_close(there, here) or abs(there - here) <= _TOLERANCE * max(there, here, 1.0)):
            yield Finding("attack_disagrees", _WHERE, f"an attack showed {there:g} there, and shows {here:g} here")
