"""Is the ledger sealed as it should be, and whole under its seal?"""

import hmac
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.audit.findings import Finding
from accounting.ledger import chain, events, seals
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed
from accounting.ledger.seals import AuditKey, PublicKey, Verifier

NO_KEY = "the ledger's chain has no key: only a head hash deposited elsewhere rules out a rewritten ledger"


def sealed(
    workdir: pathlib.Path, executed: Executed, lines: Sequence[Line], required: AuditKey | None
) -> tuple[list[Finding], list[str]]:
    """(findings, notices) about the seal.

    Args:
      required: a key from elsewhere under which the ledger must be sealed; without one, the keys in private/ are used.
    """
    declared = str(executed.declared["seal"])
    surplus = list(_surplus(workdir, declared, lines))
    own, facts = _own_key(workdir), _private_facts(workdir)
    findings = surplus + _remembered(facts, own, executed)
    if facts is None and own is not None:
        findings.append(Finding("unparsable", run_files.DATA, "it is missing, or no JSON object"))
    verifier, notices = _verifier(executed, required or own, given=required is not None)
    if required is not None and verifier is None:
        message = f"a seal under the given key was required, and this ledger claims to have a {declared}"
        message += "; an HMAC is checked with the run's keys.json alone" if declared == seals.KEYED_CHAIN else ""
        return [*findings, Finding("seal_missing", run_files.LEDGER, message)], []
    if verifier is None:
        return findings, notices
    if wrong := chain.unsealed(lines, verifier):
        whose = "the run's key" if required is None else "the key that --require_seal gives"
        message = f"{len(wrong)} lines have no seal of {whose}, the first is line {wrong[0]}"
        findings.append(Finding("seal_invalid", f"{run_files.LEDGER} line {wrong[0]}", message))
    elif executed.version >= events.PLACES:
        findings += _closing(workdir / run_files.SEAL, verifier, lines)
    return findings, notices


def _surplus(workdir: pathlib.Path, declared: str, lines: Sequence[Line]) -> Iterator[Finding]:
    """Seals of another kind than the ledger claims to have: they lie outside its chain, and nobody checks them."""
    field = {seal.name: seal.field for seal in (seals.Hmac, seals.Signature)}.get(declared)
    for number, line in enumerate(lines, start=1):
        if other := sorted(set(line.seals) - {field}):
            where = f"{run_files.LEDGER} line {number}"
            yield Finding("seal_invalid", where, f"it has a {other[0]}, which a {declared} does not have")
            break
    if declared == seals.CHAIN and (workdir / run_files.SEAL).exists():
        yield Finding("file_unknown", run_files.SEAL, "the ledger has no seal; nothing says what it holds")


def _verifier(executed: Executed, key: AuditKey | None, *, given: bool) -> tuple[Verifier | None, list[str]]:
    declared, public = str(executed.declared["seal"]), executed.declared.get("seal_key")
    if key is not None and (verifier := key.verifier(declared)) is not None:
        own = "the seal was checked with the key in private/, which comes with the folder: --require_seal=KEY takes one"
        return verifier, [] if given else [f"{own} from elsewhere"]
    if declared == seals.CHAIN:
        return None, [NO_KEY]
    if declared == seals.SIGNED_CHAIN and isinstance(public, str) and key is None:
        try:
            return PublicKey(bytes.fromhex(public)), [
                f"the signatures were checked with the public key that the ledger names, {public}: whether it is its"
                " writer's, --require_seal=KEY tells"
            ]
        except ValueError:
            pass  # what is no key checks nothing, as if there were none
    return None, ["the ledger's seal was not checked: the key is not here; say where with --require_seal=KEY"]


def _remembered(facts: dict[str, Any] | None, own: AuditKey | None, executed: Executed) -> list[Finding]:
    """What private/ remembers of seal and canaries, itself under the run's key."""
    declared, version = str(executed.declared["seal"]), executed.version
    registered = executed.declared.get("canary_sha256")
    if facts is None:
        return []
    found = []
    if version >= events.PLACES and own is not None and own.secret is not None:
        known = {name: value for name, value in facts.items() if name != "mac"}
        given, wanted = str(facts.get("mac")), run_files.private_mac(own.secret, known)
        if not hmac.compare_digest(given.encode(errors="replace"), wanted.encode()):
            message = "it was not written with this run's keys: what it says of data and seal was changed"
            found.append(Finding("seal_invalid", run_files.DATA, message))
    if version >= events.CANARIES and facts.get("canary_sha256") != registered:
        message = "the canaries that it registers are not those that the run was started with"
        found.append(Finding("canaries_disagree", run_files.LEDGER, message))
    if facts.get("seal") not in (None, declared):
        message = f"the run was started with a {facts['seal']}, and this ledger claims to have a {declared}"
        found.append(Finding("seal_invalid", run_files.LEDGER, message))
    return found


def _closing(path: pathlib.Path, verifier: Verifier, lines: Sequence[Line]) -> list[Finding]:
    """Whether the ledger still has every line with which it was closed last."""
    where = path.name
    if not path.is_file():
        return [
            Finding("missing_file", where, "it says how far the sealed ledger went; without it lines may be cut off")
        ]
    closed = seals.closed_at(verifier, path.read_bytes())
    if closed is None:
        return [Finding("seal_invalid", where, "it was not made with the run's key")]
    length, head = closed
    if not (0 < length <= len(lines) and lines[length - 1].hash == head):
        message = f"it was closed with {length} lines, and {len(lines)} are here: the end was cut off or replaced"
        return [Finding("ledger_cut", run_files.LEDGER, message)]
    return []


def _own_key(workdir: pathlib.Path) -> AuditKey | None:
    try:
        key = bytes.fromhex(json.loads((workdir / run_files.KEYS).read_text())["ledger"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return AuditKey(secret=key) if len(key) == seals.KEY_BYTES else None


def _private_facts(workdir: pathlib.Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((workdir / run_files.DATA).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None
