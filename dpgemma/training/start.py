"""Where a run's parameters start: at random, or at the weights of a Hugging Face directory."""

import dataclasses
import hashlib
import pathlib

import jax
import jax.numpy as jnp

from accounting import run_files
from accounting.errors import InputError
from dpgemma.data.text.tokenizer import BYTE
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import tensor_files, weights
from dpgemma.gemma.presets import PRESETS
from dpgemma.training.settings import TrainConfig

DEFAULT_MODEL = "tiny"


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """Attributes:
    name: the preset's, or the architecture's of a directory.
    model: the decoder, adapters included.
    directory: the Hugging Face directory, or None for random weights.
    sha256: of its weights and its configuration; None for random weights.
    """

    name: str
    model: GemmaConfig
    directory: pathlib.Path | None = None
    sha256: str | None = None

    def parameters(self, seed: int, sharding=None) -> tuple[dict, dict]:
        """(trainable, frozen) parameters. Trainable ones are float32; frozen ones keep the type of the file.

        Args:
          seed: public seed of what is random.
          sharding: of every array; by default the first device.
        """
        key = jax.random.key(seed)
        random = jax.jit(
            lambda key: lora.split(self.model, decoder.init_parameters(self.model, key))[0], out_shardings=sharding
        )
        if self.directory is None:
            return random(key), {}
        if self.model.lora is None:
            return weights.load(self.model, self.directory, sharding, jnp.float32), {}
        return random(key), weights.load(self.model, self.directory, sharding)


def of(config: TrainConfig) -> StartingPoint:
    """The starting point that `model`, or `init_from` and the adapters' flags, name.

    Raises:
      InputError: unknown preset, a directory that is none, or a row longer than the model's context.
    """
    if config.init_from is None:
        name = config.model or DEFAULT_MODEL
        if name not in PRESETS:
            raise InputError(
                f"`model`={name} is no preset: choose one of {', '.join(PRESETS)}, or give `init_from`=FOLDER"
            )
        point = StartingPoint(name, PRESETS[name])
    else:
        if config.model is not None:
            raise InputError("`init_from` brings its own architecture: drop `model`")
        directory = pathlib.Path(config.init_from)
        model = hf_config.read(directory)
        hf_config.to_hf_config(model, {})  # what could not be exported is refused before it is trained
        if config.lora_rank is not None:
            alpha = config.lora_alpha if config.lora_alpha is not None else config.lora_rank
            model = dataclasses.replace(model, lora=lora.adapters(model, config.lora_rank, alpha, config.lora_targets))
        point = StartingPoint(model.model_type, model, directory, directory_digest(directory))
    if config.sequence_length > point.model.max_length:
        raise InputError(
            f"`sequence_length`={config.sequence_length} exceeds the {point.model.max_length} tokens of {point.name}'s"
            " context: lower it"
        )
    if point.model.attention_cap is not None and config.attention == "fused":
        raise InputError(f"`attention`=fused cannot cap scores as {point.name} does: use blockwise or dense")
    return point


def tokenizer_of(config: TrainConfig) -> str:
    """What `tokenizer` means where it is omitted."""
    return config.tokenizer or config.init_from or BYTE


def directory_digest(directory: pathlib.Path) -> str:
    """SHA-256 over the SHA-256 of a directory's configuration and weights, by file name."""
    files = [directory / "config.json", *tensor_files.weight_files(directory)]
    lines = [f"{path.name} {run_files.file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
