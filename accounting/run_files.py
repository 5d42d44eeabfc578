"""The files of a run: what they are called, which of them are private, and how they are written.

Names are relative to the folder of the run. Trainer, exporter, sweep and audit take them from here.
"""

import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

CONFIG = "config.json"  # every resolved setting
LEDGER = "ledger.jsonl"  # what was executed
REPORT = "report.json"
PAGE = "report.html"
SEAL = "seal.json"  # under a sealed ledger: how far it went
METRICS = "metrics.jsonl"  # public or noised values only
CHECKPOINTS = "checkpoints"
PRIVATE = "private"  # mode 0700; the only place for what the guarantee does not cover
KEYS = f"{PRIVATE}/keys.json"
DATA = f"{PRIVATE}/data.json"  # the keyed fingerprint of the data, and how the ledger is sealed
LOCK = f"{PRIVATE}/lock"
PRIVATE_METRICS = f"{PRIVATE}/metrics.jsonl"  # raw losses and norms
REMARKS = f"{PRIVATE}/remarks.txt"  # what was noticed about single records
DAMAGED = f"{PRIVATE}/damaged"  # checkpoints that could not be used
REMOVED = f"{PRIVATE}/removed"  # checkpoints that are being deleted
HELD_OUT = f"{PRIVATE}/held_out.jsonl"  # measures of the held-out units, when all steps are taken
EVALUATIONS = f"{PRIVATE}/evaluations.jsonl"  # measures while steps are taken, and of dpgemma evaluate
CANARIES = f"{PRIVATE}/canaries.npz"  # contents and coins of planted canaries
OBSERVED = f"{PRIVATE}/canaries_observed.npy"  # what an attacker sees of gradient canaries in every step
ATTACK = f"{PRIVATE}/attack.json"  # what an attack on gradient canaries shows, and as a page
ATTACK_PAGE = f"{PRIVATE}/attack.html"
LOG = f"{PRIVATE}/log"  # what a terminal would have shown

PUBLIC_FILES = (CONFIG, LEDGER, REPORT, PAGE, METRICS, SEAL)
FOLDERS = (PRIVATE, CHECKPOINTS)

CARD = "README.md"  # the model card of an export
WEIGHTS_SUFFIX = ".safetensors"


def is_locked(workdir: pathlib.Path) -> bool:
    """Whether a process of this machine holds a run, to train it or because it has just done so."""
    try:
        with open(workdir / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file here, or none that may be locked
        return False
    return False


def can_read_private(workdir: pathlib.Path) -> bool:
    """Whether this process may look into a run's private/, which an auditor need not."""
    try:
        os.listdir(workdir / PRIVATE)
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def is_open_to_others(path: pathlib.Path) -> bool:
    """Whether others than its owner have rights to a file or folder."""
    return bool(path.stat().st_mode & 0o077)


def encode(value: Any) -> Any:
    """JSON has no infinity: it becomes the string "inf", at any depth.

    >>> encode({"epsilon": math.inf})
    {'epsilon': 'inf'}
    """
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return "inf" if value == math.inf else value


def decode(facts: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `encode` for the values of one object."""
    return {name: math.inf if value == "inf" else value for name, value in facts.items()}


def dumps(value: dict[str, Any]) -> str:
    """JSON text with infinities encoded; NaN is refused."""
    return json.dumps(encode(value), indent=1, allow_nan=False) + "\n"


def digest(content: bytes) -> str:
    """SHA-256, by which the ledger knows a file."""
    return hashlib.sha256(content).hexdigest()


def private_mac(ledger_key: bytes, facts: dict[str, Any]) -> str:
    """What shows that private/data.json was written by a holder of the run's keys."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), key=ledger_key, digest_size=32, person=b"dpgemma data").hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file that may be large."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: pathlib.Path) -> str:
    """SHA-256 of the names and contents of all files of a folder; a link counts by where it points."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            contents[path.relative_to(folder).as_posix()] = (
                f"link {path.readlink()}" if path.is_symlink() else file_digest(path)
            )
    return digest_of_files(contents)


def digest_of_files(contents: Mapping[str, str]) -> str:
    """SHA-256 of the names of files and of their contents' SHA-256."""
    return digest("".join(f"{name} {contents[name]}\n" for name in sorted(contents)).encode())


def write(path: pathlib.Path, text: str) -> None:
    """Replaces the file in one step, so that a reader sees the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
