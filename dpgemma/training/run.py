"""The folder of one run: what is public, what is private, and who may go on with it.

A new run's folder is written under a temporary name and appears complete: configuration, keys and an opened ledger
together, or not at all. Secret keys lie in private/ (mode 0700) and nowhere else.
"""

import contextlib
import fcntl
import functools
import json
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import IO, Any

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import events, executed, seals
from accounting.ledger.chain import Ledger
from accounting.ledger.history import Lineage
from accounting.ledger.seals import Seal
from dpgemma.choices import EXACT, HMAC, SIGNATURE
from dpgemma.data.text.prompts import COUNTING
from dpgemma.privacy.keys import Keys
from dpgemma.storage.appearing import appearing
from dpgemma.storage.mirror import Mirror
from dpgemma.training.checkpoint_files import CheckpointFiles, InStorage, OnDisk
from dpgemma.training.settings import OPERATIONAL


class RunDirectory:
    """Paths and the exclusive lock of a run that exists.

    Attributes:
      mirror: where the folder is the copy of one in an object storage, what takes it there; the first process has it.
      address: of that storage, if every process writes its part of a checkpoint straight into it.
    """

    def __init__(self, path: pathlib.Path, mirror: Mirror | None = None, address: str | None = None) -> None:
        self.path = path
        self.mirror = mirror
        self.address = address
        self.private = path / run_files.PRIVATE
        self.checkpoints = path / run_files.CHECKPOINTS
        self.config_file = path / run_files.CONFIG
        self.ledger_file = path / run_files.LEDGER
        self.report_file = path / run_files.REPORT
        self.page_file = path / run_files.PAGE
        self.metrics_file = path / run_files.METRICS
        self.private_metrics_file = path / run_files.PRIVATE_METRICS
        self.held_out_file = path / run_files.HELD_OUT
        self.evaluations_file = path / run_files.EVALUATIONS
        self.log_file = path / run_files.LOG
        self.observed_file = path / run_files.OBSERVED
        self.remarks_file = path / run_files.REMARKS
        self.damaged = path / run_files.DAMAGED
        self.keys_file = path / run_files.KEYS
        self.data_file = path / run_files.DATA
        self._lock: IO[str] | None = None

    def config(self) -> dict[str, Any]:
        """The resolved configuration, infinities decoded."""
        try:
            stored = json.loads(self.config_file.read_text())
        except FileNotFoundError:
            raise InputError(f"{self.path} is no run directory: it has no {run_files.CONFIG}") from None
        except ValueError:
            raise InputError(f"{self.config_file} is damaged: it is no JSON") from None
        return run_files.decode(stored)

    @property
    def checkpoint_files(self) -> CheckpointFiles:
        """Of this process."""
        return OnDisk(self.checkpoints, self.damaged) if self.address is None else InStorage(self.address)

    @property
    def checkpoint_mirror(self) -> Mirror | None:
        """What takes whole checkpoints into an object storage, where they are written to a disk first."""
        return self.mirror if self.address is None else None

    def opening(self) -> str:
        """The first line of the ledger, which no other run has; empty where there is none."""
        try:
            with open(self.ledger_file) as file:
                return file.readline()
        except FileNotFoundError:
            return ""

    def open_ledger(self) -> Ledger:
        """The ledger, ready for appending.

        Raises:
          InputError: its chain does not hold.
        """
        copy = None if self.mirror is None else self.mirror.add_line
        return Ledger.open(self.ledger_file, seal_of(self.keys, self.config()), copy)

    @functools.cached_property
    def keys(self) -> Keys:
        """The run's secret keys, read once."""
        return Keys.load(self.keys_file)

    def open_to_others(self) -> list[pathlib.Path]:
        """Those of private/ and its keys that others than their owner have rights to."""
        return [path for path in (self.private, self.keys_file) if run_files.is_open_to_others(path)]

    def remark(self, remarks: Sequence[str]) -> None:
        """Keeps what was noticed about single records, in private/."""
        self.remarks_file.write_text("".join(f"{remark}\n" for remark in remarks))

    def step_keys(self, start: dict[str, Any], lineage: Lineage) -> Keys:
        """The keys of batches and noise: secret ones are bound to the run, its data, and what decides a step's bits.

        So a copy of the run, or an older backup, that goes on with other code or on another processor adds other noise,
        and the two cannot be subtracted from each other. Public keys are for studies that can be repeated anywhere, and
        stay as they are.

        Formal guarantee: two executions of steps of one run have equal keys only if they are the same step, and this
        step and all before it were executed in the same environments, with the same data and settings. Tested by
        tests/training/moving_test.py::test_keys_follow_the_whole_way_of_a_run.

        Args:
          start: the ledger's start event.
          lineage: the environments of this step and of those before it, as the ledger's history has them.
        """
        if not start["secret_keys"]:
            return self.keys
        config = self.config()
        free = changeable(config)
        return self.keys.bound(
            {
                "start": {
                    name: start[name] for name in sorted(start) if name not in ("n", "hash", "mac", "environment")
                },
                "settings": {name: run_files.encode(config[name]) for name in config if name not in free},
                "data": json.loads(self.data_file.read_text())["fingerprint"],
                "places": [list(entry) for entry in lineage],
            }
        )

    def histogram_key(self, start: dict[str, Any]) -> bytes:
        """The key of the noise on the run's histogram: bound to run, settings, data and way of counting, to no place.

        Whole numbers and Threefry have the same bits everywhere, so that a copy of the run releases this histogram or
        none. No step has this key, because a step has a place and is no histogram. Tested by
        tests/training/histogram_test.py::test_what_is_released_is_counts_and_noise_from_the_runs_key.

        Args:
          start: the ledger's start event.
        """
        return self.step_keys(start, ()).bound({"purpose": "histogram", "counting": COUNTING}).noise

    def has_secret_keys(self) -> bool:
        """Whether the keys came from the operating system, as the ledger's first line says."""
        with contextlib.closing(self.open_ledger()) as ledger:
            return executed.of(ledger.records).has_secret_keys

    def lock(self) -> None:
        """Holds the run for this process until it ends.

        Raises:
          InputError: another process holds it.
        """
        self._lock = open(self.path / run_files.LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is training in {self.path}: wait for it, or choose another `workdir`"
            ) from None

    def publish(self) -> None:
        """Takes what has changed to where the folder is a copy of, if it is one."""
        if self.mirror is not None:
            self.mirror.publish()

    def unlock(self) -> None:
        """Lets others have the run before this process ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self.mirror is not None:
            self.mirror.close()

    def _start_event(self) -> dict[str, Any]:
        with contextlib.closing(self.open_ledger()) as ledger:
            return ledger.records[0]

    def check_config(self) -> None:
        """Refuses a run whose config.json is not the file that its ledger began with, before anything reads it.

        Formal guarantee: steps that are taken again have the settings, and by `step_keys` the keys and the noise, with
        which they were taken first. Tested by
        tests/training/run_test.py::test_a_folder_that_does_not_fit_is_refused_and_untouched.

        Raises:
          InputError: it is another file.
        """
        try:
            declared = json.loads(self.opening())["config_sha256"]
        except (ValueError, KeyError, TypeError):  # of a ledger that is damaged, which is told when it is opened
            return
        if run_files.file_digest(self.config_file) != declared:
            raise InputError(
                f"{self.config_file} is not the file that {self.path} was started with: restore it, or choose another"
                " `workdir`"
            )

    def check_format(self) -> None:
        """Refuses to train a run further whose ledger has an older format.

        Raises:
          InputError: it has.
        """
        if events.version_of(self._start_event()) != events.FORMAT:
            raise InputError(
                f"{self.path} was begun by another version of this program: it can be audited, sampled from and"
                " exported, but not trained further; start another run in a new `workdir`"
            )

    def check_resumable(self, config: dict[str, Any], fingerprint: str, start_event: dict[str, Any]) -> None:
        """Refuses to go on with other settings, other data or a ledger that was changed.

        Raises:
          InputError: names the settings that differ, with both values, or the ledger's line.
        """
        stored = self.config()
        free = changeable(stored)
        differing = [name for name in config if name not in free and stored.get(name) != config[name]]
        if differing:
            changes = ", ".join(f"{name} ({stored.get(name)} there, {config[name]} here)" for name in differing)
            further = (
                "; a run takes the steps that it was planned for: to train further, export it, start another run from"
                " the export, and add up both (dpgemma account --compose)"
                if "steps" in differing
                else ""
            )
            raise InputError(
                f"{self.path} belongs to another configuration: {changes}; give the same flags or another `workdir`"
                + further
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
        facts = self._start_event()
        # Runs of earlier versions do not say which tokenizer they have.
        said = {name: value for name, value in start_event.items() if name != events.TOKENIZER or name in facts}
        differing = [name for name in said if facts.get(name) != said[name]]
        if differing:
            names = ", ".join("the list of prompts" if name == "histogram_sha256" else name for name in differing)
            raise InputError(
                f"{self.path} started from something else: {names} differ from its ledger; give the same"
                " `init_from`, `tokenizer` and `prompt_histogram`, or another `workdir`"
            )


def changeable(config: dict[str, Any]) -> tuple[str, ...]:
    """The settings with which a run may go on as with others: they do not change what is computed.

    The data, the model that it starts from, the tokenizer and the list of prompts may have moved: they are known by
    fingerprint and SHA-256. Whole numbers have the same sum in any order, so an
    exact release may also go on with another mesh, which is another environment.
    """
    named = ("data", "init_from", "tokenizer", "prompt_histogram", "canary_model")
    return (*OPERATIONAL, *named, *(["mesh"] if config["release"] == EXACT else []))


def open_existing(path: pathlib.Path, mirror: Mirror | None = None) -> RunDirectory | None:
    """The run in a folder, locked for this process; None where the folder is missing or empty.

    Args:
      mirror: of which the folder is the copy, or None.

    Raises:
      InputError: the folder holds something else, or a run without its keys or its ledger.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    run = RunDirectory(path, mirror, None if mirror is None else mirror.checkpoints_address)
    files = {
        f"keys ({run_files.KEYS})": run.keys_file,
        f"ledger ({run_files.LEDGER})": run.ledger_file,
        run_files.CONFIG: run.config_file,
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
    run.check_config()
    return run


def create(
    path: pathlib.Path,
    config: dict[str, Any],
    keys: Keys,
    fingerprint: str,
    start_event: dict[str, Any],
    mirror: Mirror | None = None,
    private: Mapping[str, bytes] | None = None,
) -> RunDirectory:
    """A new run's folder, complete or absent.

    In an object storage the ledger's first line comes first, so that of two new runs one has no line there and ends.

    Args:
      private: further files of private/ that it begins with, by name.
    """
    with appearing(path) as folder:
        temporary = RunDirectory(folder)
        temporary.private.mkdir(mode=0o700)
        keys.save(temporary.keys_file)
        facts = {"fingerprint": fingerprint, "seal": start_event["seal"]}
        facts |= {name: start_event[name] for name in ("canary_sha256",) if name in start_event}
        for name, content in (private or {}).items():
            (temporary.path / name).write_bytes(content)
            (temporary.path / name).chmod(0o600)
        temporary.data_file.write_text(json.dumps(facts | {"mac": run_files.private_mac(keys.ledger, facts)}))
        text = run_files.dumps(config)
        temporary.config_file.write_text(text)
        ledger = Ledger.open(temporary.ledger_file, seal_of(keys, config))
        # A public name at random tells this run's ledger from that of any other, even one with the same settings.
        ledger.append(
            events.START, run_id=secrets.token_hex(16), config_sha256=run_files.digest(text.encode()), **start_event
        )
        ledger.sync()
        ledger.close()
    run = RunDirectory(path, mirror, None if mirror is None else mirror.checkpoints_address)
    run.lock()
    if mirror is not None:
        mirror.add_line(0, run.opening().rstrip("\n"))
        mirror.publish()
    return run


def seal_of(keys: Keys, config: dict[str, Any]) -> Seal | None:
    """What seals the run's ledger; None for a chain without a key."""
    name = seal_name(config["ledger_seal"])
    return seals.with_secret(name, keys.ledger)


def seal_name(setting: str) -> str:
    """How a ledger calls the seal that `ledger_seal` asks for."""
    return {HMAC: seals.KEYED_CHAIN, SIGNATURE: seals.SIGNED_CHAIN}.get(setting, seals.CHAIN)
