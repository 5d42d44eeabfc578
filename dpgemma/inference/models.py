"""A model to use without training it: a run's latest checkpoint, or a Hugging Face directory."""

import dataclasses
import json
import pathlib
from typing import Any

from accounting.errors import InputError
from accounting.ledger import chain as ledger
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.tokenizer import Tokenizer
from dpgemma.gemma import lora
from dpgemma.gemma import start as start_lib
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.files import config_json, weights
from dpgemma.storage import hub
from dpgemma.storage.mirror import Mirror
from dpgemma.training import checkpoint, data
from dpgemma.training.run import RunDirectory


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to use without training it.

    Attributes:
      config: the decoder, adapters included.
      parameters: its whole tree, or the adapters alone where the rest was not asked for.
      tokenizer: None where it was not asked for.
      base: the directory that it starts from, or None.
      base_name: by which others find it: a name of the hub, or a whole path.
    """

    config: GemmaConfig
    parameters: dict[str, Any]
    tokenizer: Tokenizer | None
    base: pathlib.Path | None
    base_name: str | None

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that was loaded with it."""
        assert self.tokenizer is not None, "the model was loaded without its tokenizer"
        return self.tokenizer


@dataclasses.dataclass(frozen=True)
class TrainedModel(Model):
    """A run's model.

    Attributes:
      step: of its checkpoint.
      ledger_lines, ledger_head: the ledger's place that the checkpoint is bound to.
    """

    run: RunDirectory
    step: int
    ledger_lines: int
    ledger_head: str


def load(
    workdir: str, base: str | None = None, *, with_base: bool = True, mirror: Mirror | None = None
) -> TrainedModel:
    """The latest checkpoint of a run.

    >>> load("/nowhere")
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: /nowhere is no run directory: it has no config.json

    Args:
      base: where the directory lies that the run started from, if it has moved.
      with_base: whether frozen parameters are wanted beside trained adapters.
      mirror: where `workdir` is the copy of a folder in an object storage, what takes it there.

    Raises:
      InputError: no run, no readable checkpoint, or no such base as the run started from.
    """
    run = RunDirectory(pathlib.Path(workdir), mirror)
    settings = run.config()
    config, sha256 = _start(run)
    step, parameters, meta = checkpoint.latest_parameters(run.checkpoints)
    if not checkpoint.is_recorded(meta, _records(run), parameters_sha256=checkpoint.digest(parameters)):
        raise InputError(
            f"checkpoint {step} of {workdir} belongs to another ledger or holds other parameters than it recorded: run"
            " dpgemma audit"
        )
    if base and sha256 is None:
        raise InputError(f"{workdir} started from random weights: drop `init_from`")
    origin = base or settings["init_from"]
    directory = hub.located(base) if base else _where(origin) if origin else None
    there = directory or pathlib.Path()
    needs_base = config.lora is not None and with_base
    brings_tokenizer = directory is not None and settings["tokenizer"] == settings["init_from"]
    if (base or needs_base or brings_tokenizer) and not there.is_dir():
        raise InputError(
            f"the model that this run started from is not at {directory} any more: say where with `init_from`=FOLDER"
        )
    if (base or needs_base) and start_lib.directory_digest(there) != sha256:
        raise InputError(
            f"{directory} is not the model that this run started from: its SHA-256 differs; give another `init_from`"
        )
    if needs_base:
        parameters = lora.join(parameters, weights.load(config, there))
    tokenizer = tokenizer_lib.load(
        str(directory) if brings_tokenizer else data.located_tokenizer(settings["tokenizer"])
    )
    name = None if origin is None else hub.absolute(origin)
    return TrainedModel(
        config, parameters, tokenizer, directory, name, run, step, meta["ledger_lines"], meta["ledger_head"]
    )


def _where(name: str) -> pathlib.Path:
    """The folder of a model, be it there or not."""
    try:
        return hub.located(name)
    except InputError:
        return pathlib.Path(name)


def sequence_length(model: TrainedModel) -> int:
    """The length of the rows that a run was trained on."""
    return int(model.run.config()["sequence_length"])


def load_directory(directory: str, tokenizer: str | None = None, *, with_tokenizer: bool = True) -> Model:
    """The model of a Hugging Face directory, weights in the type of the file.

    >>> load_directory("/nowhere")
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: /nowhere is no Hugging Face directory: it has no config.json

    Args:
      tokenizer: where the directory has none, as `tokenizer` names it.

    Raises:
      InputError: no such directory, or one that this program cannot read.
    """
    path = hub.located(directory)
    config = config_json.read(path)
    loaded = tokenizer_lib.load(data.located_tokenizer(tokenizer or str(path))) if with_tokenizer else None
    if loaded is not None:
        tokenizer_lib.check_vocabulary(loaded, config.vocab_size)
    return Model(config, weights.load(config, path), loaded, path, hub.absolute(directory))


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    """The ledger as far as it can be read: the run may be at work."""
    try:
        return [line.record for line in ledger.inspect(ledger.text_of(run.ledger_file))[0]]
    except OSError:
        return []


def _start(run: RunDirectory) -> tuple[GemmaConfig, str | None]:
    """The architecture with which the run's ledger opens, and the SHA-256 of the directory that it started from."""
    try:
        with open(run.ledger_file) as file:
            facts = json.loads(file.readline())
        return GemmaConfig.from_dict(facts["architecture"]), facts["init_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{run.ledger_file} does not begin with a sound start event: run dpgemma audit") from None
