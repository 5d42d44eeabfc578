"""Does anything secret lie where others can read it?"""

import json
import pathlib
import re
import stat
from collections.abc import Container, Iterator

from accounting import run_files
from accounting.audit.findings import Finding

_SHORTEST_KEY = 32  # hexadecimal digits; shorter texts occur by chance
_READ_AT_MOST = 64 * 2**20
_RAW = re.compile(
    rb"\b(?:(?:train|training|private|held_out)[_ ]?)?(?:loss(?:es)?|grad(?:ient)?[_"
    rb" ]?norms?|norm_quantiles|bits_per_byte)\b"
    rb"[\"']?\s*[:=,]?\s*[\[(]?\s*-?\d",
    re.IGNORECASE,
)


def permissions(private: pathlib.Path) -> Iterator[Finding]:
    """private/ and its keys are for their owner alone."""
    for path, name in ((private, "private/"), (private / pathlib.Path(run_files.KEYS).name, run_files.KEYS)):
        if not path.exists():
            yield Finding("missing_file", name, "the run has no keys; restore them or keep this copy without private/")
        elif run_files.is_open_to_others(path):
            mode = stat.S_IMODE(path.stat().st_mode)
            yield Finding(
                "key_readable",
                name,
                f"its mode is {mode:o}, so others can read it; take their rights away with chmod go=",
            )


def leaks(workdir: pathlib.Path, files: list[pathlib.Path], exported: Container[str] = ()) -> Iterator[Finding]:
    """Raw losses and norms, copies of private files, and keys, in any file outside private/ and checkpoints/.

    Args:
      exported: digests of files that the program wrote with an export: a vocabulary may well hold the word loss and a
        number behind it.
    """
    private = workdir / run_files.PRIVATE
    keys = _keys(workdir / run_files.KEYS)
    kept = private.rglob("*") if run_files.can_read_private(workdir) else ()
    copies = {run_files.file_digest(path): path.name for path in kept if path.is_file() and path.stat().st_size}
    public = [path for path in (workdir / name for name in run_files.PUBLIC_FILES) if path.is_file()]
    for path in [*public, *files]:
        name = str(path.relative_to(workdir))
        with open(path, "rb") as file:
            content = file.read(_READ_AT_MOST)
        if any(key in content for key in keys):
            yield Finding("key_readable", name, "it holds a secret key of the run")
        if path in public or path.suffix == run_files.WEIGHTS_SUFFIX or run_files.file_digest(path) in exported:
            continue  # their content is checked against the ledger
        if run_files.file_digest(path) in copies:
            yield Finding("raw_values_public", name, f"it is a copy of private/{copies[run_files.file_digest(path)]}")
        elif found := _RAW.search(content):
            shown = found.group().decode(errors="replace")
            yield Finding(
                "raw_values_public",
                name,
                f"it seems to hold raw values of private data ({shown!r}); keep it in private/",
            )


def _keys(path: pathlib.Path) -> list[bytes]:
    try:
        stored = json.loads(path.read_text())
        keys = [value for value in stored.values() if len(value) >= _SHORTEST_KEY]
        return [form for key in keys for form in (key.encode(), key.upper().encode(), bytes.fromhex(key))]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []
