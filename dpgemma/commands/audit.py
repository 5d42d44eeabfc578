"""dpgemma audit WORKDIR: derives a run's epsilon again from its ledger, and compares it with everything else in the
folder.
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags, places

if TYPE_CHECKING:
    from dpgemma.inference.memorisation import Share

_PRIVATE = (
    "These figures are facts about single units, which no guarantee covers: they are for the operator alone. Intervals"
    " are 95 %."
)

_OF_AUDIT = ("export", "head", "require_seal", "empirical")
_OF_MEMORISATION = ("data", "text_field", "passages", "prefix", "suffix")

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
    command_flags.switch(
        "memorisation",
        "Instead of the audit, count which passages of its training data the model continues word for word; also for a"
        " Hugging Face directory, with --data.",
        fv,
    )
    command_flags.string(
        "against",
        None,
        "With --memorisation, another run or Hugging Face directory, which is asked too; with --empirical, a model"
        " that was never trained on the canaries: it corrects for how likely each text is anyway.",
        fv,
    )
    command_flags.string(
        "data", None, "With --memorisation, where the run's data lie now, or the records to ask for.", fv
    )
    command_flags.string("text_field", "text", "Field of such a record that holds the text.", fv)
    command_flags.count("passages", 10_000, "The most passages of each kind that are asked for.", fv)
    command_flags.count("prefix", 50, "Tokens that the model is given.", fv)
    command_flags.count("suffix", 50, "Tokens that it has to continue them with.", fv)
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if not fv.workdir:
        raise InputError("say which run to check: dpgemma audit WORKDIR")
    others = _OF_AUDIT if fv.memorisation else _OF_MEMORISATION
    given = [name for name in others if fv[name].present]
    if given:
        what = "have no meaning with" if fv.memorisation else "belong to"
        raise InputError(f"{', '.join(f'--{name}' for name in given)} {what} --memorisation: drop one of them")
    if fv.memorisation:
        return _memorisation(fv)
    if fv.against and not fv.empirical:
        raise InputError("--against needs a question: give --empirical or --memorisation with it")
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
        attack = against = None
        if fv.empirical:
            from dpgemma.inference.attacking import attacked, attacked_against

            against = attacked_against(workdir, fv.against) if fv.against else None
            attack = attacked(workdir)
        result = audit(workdir, tuple(exports), head=fv.head, required=required, attack=attack, against=against)
        locked = locked or (ledger.is_file() and ledger.stat().st_size != before)
    if locked and not result.finished:  # its files are written one after the other; those of a finished run stay
        result = result.while_running()
    print(json.dumps(run_files.encode(result.as_dict()), indent=1) if fv.json else result.text())
    return 0 if result.consistent else 1


def _memorisation(fv: flags.FlagValues) -> int:
    """Prints what models have memorised."""
    from dpgemma.commands import progress
    from dpgemma.inference import memorisation as lib
    from dpgemma.inference.models import Model, TrainedModel

    question = lib.Question(fv.passages, fv.prefix, fv.suffix)
    shares: list[lib.Share] = []
    groups: list[lib.Group] = []
    first: Model | None = None
    for folder in [fv.workdir, *([fv.against] if fv.against else [])]:
        with progress.phase(f"reading {folder}"):
            model = lib.model_of(folder)
            lib.check_context(model, question)
            # A run is asked for its own units and canaries; another model for those of the first one.
            if isinstance(model, TrainedModel):
                groups = lib.of_run(model, fv.data, question)
            elif not groups:
                if not fv.data:
                    raise InputError(
                        f"{folder} does not know what it was trained on: give --data, the records to ask for"
                    )
                groups = lib.of_records(model, fv.data, fv.text_field, question)
            elif first is not None:
                lib.check_alike(model, folder, first)
            first = first or model
        shares += lib.measured(model, folder, groups, progress.phase)
    print(_PRIVATE, file=sys.stderr)
    if fv.json:
        print(json.dumps({"shares": [share.as_dict() for share in shares]}))
        return 0
    print(f"{'exact':>22}  {'within 10 %':>22}  repeats  passages")
    for share in shares:
        cells = [_share(share, count) for count in (share.exact, share.approximate)]
        repeats = "-" if share.repeats is None else share.repeats
        print(f"{cells[0]:>22}  {cells[1]:>22}  {repeats:>7}  {share.passages:>8}  {share.group} ({share.model})")
    return 0


def _share(share: "Share", count: int) -> str:
    low, high = share.interval(count)
    return f"{count / share.passages:.2%} ({low:.1%} to {high:.1%})"
