"""How a corpus is sampled, and which texts are kept: all of it public.

Nothing heavy is imported, so that --help answers at once.
"""

import dataclasses

from accounting.errors import InputError
from dpgemma.gemma.sampling_settings import SamplingSettings, setting


@dataclasses.dataclass(frozen=True)
class SynthesisSettings(SamplingSettings):
    """How records are sampled: record i follows from the seed, from i and from the model."""

    max_new_tokens: int = setting(512, "Most tokens of a record; a text that has no end by then is left out.")
    num_records: int = setting(1000, "Records to write.")
    batch_size: int = setting(128, "Texts that are sampled at once; it changes none of them but for rounding.")
    min_characters: int = setting(1, "Shorter texts are left out.")
    keep_duplicates: bool = setting(
        False, "Keep texts that were there before; with prompts that is the default, so that none is drawn less often."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_records", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Public texts, one of which every record answers.

    Attributes:
      texts: the prompts; empty where records are whole texts.
      weights: by which they are drawn; None where all are alike.
      as_chat: whether they are put into a user's turn.
      are_counted: whether the weights are counts that the run released under noise.
    """

    texts: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    as_chat: bool = False
    are_counted: bool = False
