"""The folder of one run: what is public, what is private, and who may go on with it.

A new run's folder is written under a temporary name and appears complete: configuration, keys and an opened ledger
together, or not at all. Secret keys are 256 bits from the operating system. They lie in private/keys.json (0600, in a
folder of mode 0700) and nowhere else.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import executed
from accounting.ledger.chain import Ledger
from dpgemma.training.settings import OPERATIONAL


@dataclasses.dataclass(frozen=True)
class Keys:
    """256-bit secrets: which units are drawn, which noise is added, which units are held out, the data's fingerprint,
    the ledger's HMAC.
    """

    sampling: bytes = dataclasses.field(repr=False)
    noise: bytes = dataclasses.field(repr=False)
    holdout: bytes = dataclasses.field(repr=False)
    fingerprint: bytes = dataclasses.field(repr=False)
    ledger: bytes = dataclasses.field(repr=False)

    @classmethod
    def generate(cls) -> "Keys":
        return cls(*(secrets.token_bytes(32) for _ in dataclasses.fields(cls)))

    def save(self, path: pathlib.Path) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({field.name: getattr(self, field.name).hex() for field in dataclasses.fields(self)}, file)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Keys":
        try:
            stored = json.loads(path.read_text())
            keys = {field.name: bytes.fromhex(stored[field.name]) for field in dataclasses.fields(cls)}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path} is damaged: without its keys this run cannot go on; start another in a new `workdir`"
            ) from None
        if any(len(key) != 32 for key in keys.values()):
            raise InputError(f"{path} holds keys of another length: it was not written by this program")
        return cls(**keys)


class RunDirectory:
    """Paths and the exclusive lock of a run that exists."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.private = path / "private"
        self.checkpoints = path / "checkpoints"
        self.config_file = path / "config.json"
        self.ledger_file = path / "ledger.jsonl"
        self.report_file = path / "report.json"
        self.page_file = path / "report.html"
        self.metrics_file = path / "metrics.jsonl"
        self.keys_file = self.private / "keys.json"
        self.data_file = self.private / "data.json"
        self._lock = None

    def config(self) -> dict:
        """The resolved configuration, infinities decoded."""
        try:
            stored = json.loads(self.config_file.read_text())
        except FileNotFoundError:
            raise InputError(f"{self.path} is no run directory: it has no config.json") from None
        except ValueError:
            raise InputError(f"{self.config_file} is damaged: it is no JSON") from None
        return {name: float("inf") if value == "inf" else value for name, value in stored.items()}

    def open_ledger(self) -> Ledger:
        """The ledger, ready for appending.

        Raises:
          InputError: its chain does not hold.
        """
        return Ledger.open(self.ledger_file, ledger_key(self.keys(), self.config()))

    def keys(self) -> Keys:
        return Keys.load(self.keys_file)

    def has_secret_keys(self) -> bool:
        """Whether the keys came from the operating system, as the ledger's first line says."""
        with contextlib.closing(self.open_ledger()) as ledger:
            return executed.of(ledger.records).has_secret_keys

    def lock(self) -> None:
        """Holds the run for this process until it ends.

        Raises:
          InputError: another process holds it.
        """
        self._lock = open(self.private / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is training in {self.path}: wait for it, or choose another `workdir`"
            ) from None

    def unlock(self) -> None:
        """Lets others have the run before this process ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_resumable(self, config: dict, fingerprint: str, start_event: dict) -> None:
        """Refuses to go on with other settings, other data or a ledger that was changed.

        Raises:
          InputError: names the settings that differ, with both values, or the ledger's line.
        """
        stored = self.config()
        differing = [name for name in config if name not in OPERATIONAL and stored.get(name) != config[name]]
        if differing:
            changes = ", ".join(f"{name} ({stored.get(name)} there, {config[name]} here)" for name in differing)
            raise InputError(
                f"{self.path} belongs to another configuration: {changes}; give the same flags or another `workdir`"
            )
        try:
            known = json.loads(self.data_file.read_text())["fingerprint"]
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"{self.data_file} is missing or damaged: the run cannot tell whether the data are its own"
            ) from None
        if known != fingerprint:
            raise InputError(
                f"the data differ from those that {self.path} was started with: give the same data or another `workdir`"
            )
        with contextlib.closing(self.open_ledger()) as ledger:
            facts = ledger.records[0]
        differing = [name for name in start_event if facts.get(name) != start_event[name]]
        if differing:
            raise InputError(
                f"{self.path} started from something else: {', '.join(differing)} differ from its ledger; give the same"
                " `init_from` or another `workdir`"
            )


def open_existing(path: pathlib.Path) -> RunDirectory | None:
    """The run in a folder, locked for this process; None where the folder is missing or empty.

    Raises:
      InputError: the folder holds something else, or a run without its keys or its ledger.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    run = RunDirectory(path)
    files = {
        "keys (private/keys.json)": run.keys_file,
        "ledger (ledger.jsonl)": run.ledger_file,
        "config.json": run.config_file,
    }
    missing = [name for name, file in files.items() if not file.is_file()]
    if len(missing) == len(files):
        raise InputError(f"{path} is neither empty nor the folder of a run: choose another `workdir`")
    if missing:
        raise InputError(
            f"{path} is a run without its {' and '.join(missing)}: going on could spend the budget twice; restore what"
            " is missing, or choose another `workdir`"
        )
    run.lock()
    return run


def create(path: pathlib.Path, config: dict, keys: Keys, fingerprint: str, start_event: dict) -> RunDirectory:
    """A new run's folder, complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = RunDirectory(path.with_name(f".{path.name}.{os.getpid()}.new"))
    shutil.rmtree(temporary.path, ignore_errors=True)
    try:
        temporary.private.mkdir(parents=True)
        temporary.private.chmod(0o700)
        keys.save(temporary.keys_file)
        temporary.data_file.write_text(json.dumps({"fingerprint": fingerprint, "seal": start_event["seal"]}))
        text = run_files.dumps(config)
        temporary.config_file.write_text(text)
        ledger = Ledger.open(temporary.ledger_file, ledger_key(keys, config))
        # A public name at random tells this run's ledger from that of any other, even one with the same settings.
        ledger.append(
            "start", run_id=secrets.token_hex(16), config_sha256=run_files.digest(text.encode()), **start_event
        )
        ledger.sync()
        ledger.close()
        os.rename(temporary.path, path)
    except BaseException:
        shutil.rmtree(temporary.path, ignore_errors=True)
        raise
    run = RunDirectory(path)
    run.lock()
    return run


def ledger_key(keys: Keys, config: dict) -> bytes | None:
    """The key of the ledger's HMACs, if the run was configured with them."""
    return keys.ledger if config["ledger_seal"] == "hmac" else None


def fingerprint(keys: Keys, rows) -> str:
    """Keyed hash of the packed data; kept in private/, because an unkeyed one would let anyone test a guess of the
    data.
    """
    digest = hashlib.blake2b(key=keys.fingerprint, digest_size=32)
    for column in (rows.tokens, rows.scored):
        digest.update(repr(column.shape).encode())
        digest.update(column.data)
    return digest.hexdigest()
