"""The audit of a run's folder, its checkpoints included."""

import pathlib
from typing import Any

from accounting import run_files
from accounting.audit import audit as audit_lib
from accounting.audit.findings import AuditResult
from accounting.ledger.seals import AuditKey


def audit(
    workdir: str | pathlib.Path,
    exports: tuple[pathlib.Path, ...] = (),
    *,
    head: str | None = None,
    required: AuditKey | None = None,
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

    Raises:
      InputError: the folder is no run, or an export is no export.
    """
    path = pathlib.Path(workdir)
    return audit_lib.audit(path, _checkpoints(path / run_files.CHECKPOINTS), exports, head=head, required=required)


def _checkpoints(folder: pathlib.Path) -> list[dict[str, Any]]:
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        return []
    from dpgemma.training import checkpoint

    return checkpoint.summaries(folder)
