"""The audit of a run's folder, its checkpoints and its canaries included."""

import dataclasses
import json
import pathlib
from typing import Any

from accounting import run_files
from accounting.audit import audit as audit_lib
from accounting.audit.canary_checks import Measured
from accounting.audit.findings import AuditResult
from accounting.empirical.protocol import Assessment
from accounting.errors import InputError
from accounting.ledger.seals import AuditKey


def audit(
    workdir: str | pathlib.Path,
    exports: tuple[pathlib.Path, ...] = (),
    *,
    head: str | None = None,
    required: AuditKey | None = None,
    attack: Assessment | None = None,
    against: Assessment | None = None,
) -> AuditResult:
    """Derives a run's epsilon again from its ledger, and compares it with everything else in its folder.

    >>> audit("/nowhere")
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: /nowhere is no run directory: it has none of ...

    Args:
      exports: exported folders to check besides those inside the run's.
      head: hash of a line that was deposited elsewhere.
      required: key from elsewhere under which the ledger must be sealed.
      attack, against: on the run's canaries, measured anew, and by a reference model (dpgemma.inference.attacking).

    Raises:
      InputError: the folder is no run, or an export is no export.
    """
    path = pathlib.Path(workdir)
    checkpoints = _checkpoints(path / run_files.CHECKPOINTS)
    measured = dataclasses.replace(_canaries(path), assessment=attack, against=against)
    return audit_lib.audit(path, checkpoints, exports, head=head, required=required, measured=measured)


def _checkpoints(folder: pathlib.Path) -> list[dict[str, Any]]:
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        return []
    from dpgemma.training import checkpoint

    return checkpoint.summaries(folder)


def _canaries(workdir: pathlib.Path) -> Measured:
    """What private/ holds of canaries."""
    keys = workdir / run_files.KEYS
    if not run_files.can_read_private(workdir) or not keys.exists() or not (workdir / run_files.CANARIES).exists():
        return Measured()
    from dpgemma.privacy.keys import Keys
    from dpgemma.training import canaries

    try:
        found = canaries.kept(workdir, Keys.load(keys).holdout)
    except InputError as error:
        return Measured(unreadable=str(error))
    try:
        content = (workdir / run_files.ATTACK).read_bytes()
        kept = (json.loads(content), found.bound(content))
    except (OSError, ValueError, RecursionError):
        kept = None
    return Measured(found.digest(), None, found.coins_follow_from_seed, kept)
