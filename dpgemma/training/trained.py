"""A run's latest model, for commands that use it without training it."""

import dataclasses
import pathlib

from accounting.errors import InputError
from dpgemma.gemma import tokenizer as tokenizer_lib
from dpgemma.gemma.config import PRESETS, GemmaConfig
from dpgemma.training import checkpoint
from dpgemma.training.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    run: RunDirectory
    step: int
    config: GemmaConfig
    parameters: dict
    tokenizer: object


def load(workdir: str | None) -> TrainedModel:
    """The latest checkpoint of a run.

    Raises:
      InputError: no --workdir, no run, or no readable checkpoint.
    """
    if not workdir:
        raise InputError("say which run to take the model from: --workdir=FOLDER")
    run = RunDirectory(pathlib.Path(workdir))
    settings = run.config()
    model = settings.get("model")
    if model not in PRESETS:
        raise InputError(f"{run.config_file} names no known model ({model!r})")
    step, parameters, _ = checkpoint.latest_parameters(run.checkpoints)
    return TrainedModel(run, step, PRESETS[model], parameters, tokenizer_lib.load(settings["tokenizer"]))
