"""The settings by which tokens are sampled, with the text that --help shows.

Nothing heavy is imported, so that --help answers at once.
"""

import dataclasses
from typing import Any

from accounting.errors import InputError
from dpgemma.choices import DTYPES
from dpgemma.gemma.next_token import Sampling


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of settings with its help."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How tokens are sampled, and at most how many."""

    max_new_tokens: int = setting(120, "Most tokens to generate.")
    temperature: float = setting(
        1.0, "0 takes the likeliest token, 1 samples from the model's distribution; below 1 texts are more alike."
    )
    top_k: int | None = setting(None, "Only the k likeliest tokens.")
    top_p: float = setting(1.0, "Only the likeliest tokens whose probabilities together reach p.")
    seed: int = setting(0, "Public seed of the sampling.")
    dtype: str = setting("float32", "Type of activations and matrix products.", DTYPES)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}")
        try:
            self.sampling()
        except ValueError as error:
            raise InputError(str(error)) from None

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)
