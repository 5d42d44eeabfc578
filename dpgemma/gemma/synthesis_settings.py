"""How a corpus is sampled, and which texts are kept: all of it public.

Nothing heavy is imported, so that --help answers at once.
"""

import dataclasses
from typing import Any

from accounting.errors import InputError
from dpgemma.choices import DTYPES
from dpgemma.gemma.next_token import Sampling


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """How records are sampled, with the text that --help shows."""

    num_records: int = _setting(1000, "Records to write.")
    max_new_tokens: int = _setting(512, "Most tokens of a record; a text that has no end by then is left out.")
    temperature: float = _setting(1.0, "1 samples from the model's distribution; below it texts are more alike.")
    top_k: int | None = _setting(None, "Only the k likeliest tokens.")
    top_p: float = _setting(1.0, "Only the likeliest tokens whose probabilities together reach p.")
    seed: int = _setting(0, "Public seed: record i follows from it, from i and from the model.")
    batch_size: int = _setting(128, "Texts that are sampled at once; it changes none of them but for rounding.")
    min_characters: int = _setting(1, "Shorter texts are left out.")
    keep_duplicates: bool = _setting(False, "Keep texts that were there before.")
    dtype: str = _setting("float32", "Type of activations and matrix products.", DTYPES)

    def __post_init__(self) -> None:
        for name in ("num_records", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        try:
            self.sampling()
        except ValueError as error:
            raise InputError(str(error)) from None

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Public texts, one of which every record answers.

    Attributes:
      texts: the prompts; empty where records are whole texts.
      weights: by which they are drawn; None where all are alike.
      as_chat: whether they are put into a user's turn.
    """

    texts: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    as_chat: bool = False
