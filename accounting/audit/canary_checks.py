"""Are a run's canaries those that its ledger registered, and does an attack on them contradict what was proved?"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.empirical import protocol as protocol_lib
from accounting.empirical.protocol import Assessment, Protocol
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
      coins_follow: whether their coins are those of the run's keys.
      kept: what an attack showed that is kept in private/, and its keyed hash.
      assessment: of an attack that was measured for this audit.
      against: of an attack by a reference model that no protocol named.
    """

    digest: str | None = None
    unreadable: str | None = None
    coins_follow: bool = True
    kept: tuple[dict[str, Any], str] | None = None
    assessment: Assessment | None = None
    against: Assessment | None = None


def attack_of(executed: Executed, measured: Measured) -> dict[str, Any] | None:
    """The assessment that the ledger records, or binds in private/, if there is one."""
    for event in executed.events:
        if event["kind"] == events.ATTACK and "assessment" in event:
            found: dict[str, Any] = event["assessment"]
            return found
        if event["kind"] == events.ATTACK and measured.kept is not None:
            kept, declared = measured.kept[0], executed.declared
            protocol = protocol_lib.of_kind(declared["canary_kind"], executed.planned.sampling_probability)
            return kept if _unsound(kept, protocol, declared["canaries"]) is None else None
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
    protocol = protocol_lib.of_kind(declared["canary_kind"], executed.planned.sampling_probability)
    repeats = declared["canary_repeats"]
    if declared["audit_protocol"] != protocol.facts():
        yield Finding("ledger_edited", where, "its audit protocol is not the one that this program registers")
        return
    if not repeats or not all(type(times) is int and times >= 1 for times in repeats):
        yield Finding("ledger_edited", where, "its canaries are planted as no number of units")
        return
    if len(attacks) > 1:
        yield Finding("ledger_line_repeated", _WHERE, "a second attack: canaries are attacked once, by the protocol")
    if executed.finished and not attacks and 1 in repeats[: declared["canaries"]]:
        yield Finding("ledger_line_removed", _WHERE, "canaries are registered, and no line says what they showed")
    for record in attacks:
        is_public = declared["canary_kind"] != protocol_lib.GRADIENT
        if "not_measured" in record:
            yield Finding("attack_disagrees", _WHERE, f"the attack was not measured: {record['not_measured']}")
        elif ("assessment" in record) != is_public or ("kept_sha256" in record) == is_public:
            yield Finding("ledger_edited", _WHERE, "what an attack showed is not where this program writes it")
        elif is_public and (problem := _unsound(record["assessment"], protocol, declared["canaries"])):
            yield Finding("ledger_edited", _WHERE, problem)
        elif record["step"] != executed.planned.steps:
            yield Finding("ledger_edited", _WHERE, "an attack before the last step: nothing was registered of it")


def _unsound(found: dict[str, Any], protocol: Protocol, canaries: int) -> str | None:
    """What is wrong with an assessment's form; None where nothing is."""
    wanted = [(score, bound) for score in protocol.scores for bound in protocol.bounds]
    try:
        numbers = [bound["epsilon"] for bound in found["bounds"]]
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
    except (KeyError, TypeError, AttributeError, ValueError):
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
    elif not measured.coins_follow:
        yield Finding("canaries_disagree", run_files.CANARIES, "their coins are not those of the run's keys")
    for event in executed.events:
        if event["kind"] == events.ATTACK and "kept_sha256" in event:
            if measured.kept is None:
                yield Finding("missing_file", run_files.ATTACK, "the ledger binds it, and it is not here")
            elif measured.kept[1] != event["kept_sha256"]:
                yield Finding("attack_disagrees", run_files.ATTACK, "it is not what the ledger binds")


def contradictions(executed: Executed, epsilon: float, measured: Measured) -> Iterator[Finding]:
    """Whether an attack shows more than was proved, and whether the run's agrees with one that was measured anew.

    Args:
      epsilon: that was derived from the ledger.
    """
    known = attack_of(executed, measured)
    found = None if measured.assessment is None else measured.assessment.as_dict()
    against = None if measured.against is None else measured.against.as_dict()
    shown = [attack for attack in (known, found, against) if attack is not None]
    contradicting = [attack["lower_bound"] for attack in shown if attack["contradicts"]]
    if contradicting:
        yield Finding(
            "guarantee_contradicted",
            _WHERE,
            f"AN ATTACK ON THE CANARIES SHOWS EPSILON {max(contradicting):g} AT LEAST, AND {epsilon:g} WAS PROVED AT"
            " MOST: the program or the machine that trained this model does not do what the proof assumes; release"
            " nothing of it",
        )
    if known is None or found is None:
        return
    for there, here in zip(known["bounds"], found["bounds"], strict=True):
        a, b = there["epsilon"], here["epsilon"]
        if there["contradicts"] != here["contradicts"] or abs(a - b) > _TOLERANCE * max(a, b, 1.0):
            message = f"{there['bound']} of {there['score']} showed {a:g} there, and shows {b:g} here"
            yield Finding("attack_disagrees", _WHERE, message)
