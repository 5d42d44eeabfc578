"""Where the parameters of a model start: at random, or at the weights of a Hugging Face directory."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from accounting import run_files
from accounting.errors import InputError
from dpgemma.gemma import decoder, lora, presets
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.files import config_json, tensor_files, weights

DEFAULT_MODEL = "tiny"


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """A model and where its parameters start.

    Attributes:
      name: the preset's, or the architecture's of a directory.
      model: the decoder, adapters included.
      directory: the Hugging Face directory, or None for random weights.
      sha256: of its weights and its configuration; None for random weights.
    """

    name: str
    model: GemmaConfig
    directory: pathlib.Path | None = None
    sha256: str | None = None

    def parameters(self, seed: int, shardings: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        """(trainable, frozen) parameters. Trainable ones are float32; frozen ones keep the type of the file.

        Args:
          seed: public seed of what is random.
          shardings: trees like the two results, of every array's sharding; by default the first device.
        """
        of_trainable, of_frozen = shardings or (None, None)

        def random(key: jax.Array) -> Any:
            return lora.split(self.model, decoder.init_parameters(self.model, key))[0]

        make_random = jax.jit(random, out_shardings=of_trainable)
        if self.directory is None:
            return make_random(jax.random.key(seed)), {}
        if self.model.lora is None:
            return weights.load(self.model, self.directory, of_trainable, jnp.float32), {}
        return make_random(jax.random.key(seed)), weights.load(self.model, self.directory, of_frozen)


def of_preset(name: str | None) -> StartingPoint:
    """A model with random weights, by its name (presets.named); the default one for None.

    Raises:
      InputError: no such model.
    """
    name = name or DEFAULT_MODEL
    return StartingPoint(name, presets.named(name))


def of_directory(
    directory: pathlib.Path, lora_rank: int | None = None, lora_alpha: float | None = None, lora_targets: str = lora.ALL
) -> StartingPoint:
    """The model of a Hugging Face directory, with adapters if a rank is given.

    Args:
      lora_alpha: scale of the adapters, divided by the rank; by default the rank.
      lora_targets: names of linear layers, separated by commas, or "all".

    Raises:
      InputError: no such directory, one that this program cannot run or write again, weights that are damaged, or
        impossible adapters.
    """
    model = config_json.read(directory)
    config_json.to_hf_config(model, {})  # what could not be exported is refused before it is trained
    weights.check(model, directory)
    if lora_rank is not None:
        alpha = lora_alpha if lora_alpha is not None else lora_rank
        model = dataclasses.replace(model, lora=lora.adapters(model, lora_rank, alpha, lora_targets))
    return StartingPoint(model.model_type, model, directory, directory_digest(directory))


def check(point: StartingPoint, length: int, attention: str) -> None:
    """Refuses rows and ways of attention that a model cannot have.

    Raises:
      InputError: a row longer than the context, or fused attention for a model that caps its scores.
    """
    if length > point.model.max_length:
        raise InputError(
            f"`sequence_length`={length} exceeds the {point.model.max_length} tokens of {point.name}'s context: lower"
            " it"
        )
    if point.model.attention_cap is not None and attention == "fused":
        raise InputError(f"`attention`=fused cannot cap scores as {point.name} does: use blockwise or dense")


def directory_digest(directory: pathlib.Path) -> str:
    """SHA-256 over the SHA-256 of a directory's configuration and weights, by file name."""
    files = [directory / config_json.FILE, *tensor_files.weight_files(directory)]
    lines = [f"{path.name} {run_files.file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
