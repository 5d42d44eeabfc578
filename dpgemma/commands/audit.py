"""dpgemma audit WORKDIR: derives a run's epsilon again from its ledger, and compares it with everything else in the
folder.
"""

import json
import pathlib

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags, places

DESCRIPTION = "Check a run: dpgemma audit WORKDIR. Exit code 0: all agrees; 1: findings; 2: no run."
POSITIONAL = ("workdir",)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run; also given without the flag's name.", fv)
    command_flags.string(
        "export", None, "Exported folders outside the run's to check with it, separated by commas.", fv
    )
    command_flags.string(
        "head", None, "Hash that was printed as the ledger head once, and must still be that of a line.", fv
    )
    command_flags.string(
        "require_seal",
        None,
        "Key from elsewhere under which the ledger must be sealed: a public key, a file with it, or a run's keys.json.",
        fv,
    )
    command_flags.switch(
        "empirical",
        "Attack the run's canaries by the protocol that its ledger registered, and compare what that shows with what"
        " was proved; needs private/.",
        fv,
    )
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if not fv.workdir:
        raise InputError("say which run to check: dpgemma audit WORKDIR")
    from accounting import run_files
    from accounting.ledger import seals
    from dpgemma.training.auditing import audit

    exports = [pathlib.Path(folder) for folder in (fv.export or "").split(",") if folder]
    if fv.head is not None and not (len(fv.head) == 64 and set(fv.head) <= set("0123456789abcdef")):
        raise InputError(f"--head={fv.head} is no ledger head: give the 64 hexadecimal digits that train printed")
    required = None if fv.require_seal is None else seals.read_key(fv.require_seal)
    with places.for_reading(fv.workdir) as workdir:
        ledger = workdir / run_files.LEDGER
        before = ledger.stat().st_size if ledger.is_file() else 0
        locked = run_files.is_locked(workdir) or places.is_held(fv.workdir)
        attack = None
        if fv.empirical:
            from dpgemma.inference.attacking import attacked

            attack = attacked(workdir)
        result = audit(workdir, tuple(exports), head=fv.head, required=required, attack=attack)
        locked = locked or (ledger.is_file() and ledger.stat().st_size != before)
    if locked and not result.finished:  # its files are written one after the other; those of a finished run stay
        result = result.while_running()
    print(json.dumps(run_files.encode(result.as_dict()), indent=1) if fv.json else result.text())
    return 0 if result.consistent else 1
