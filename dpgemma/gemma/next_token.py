"""How the next token of an answer is chosen."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; None for all.
      top_p: only the smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2019, arXiv
        1904.09751).
      seed: of the choice. Row i of a batch draws from a stream of its own.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            not self.temperature >= 0
            or not 0 < self.top_p <= 1
            or (self.top_k is not None and self.top_k < 1)
            or not 0 <= self.seed < 2**32
        ):
            raise ValueError("temperature must be at least 0, top_k at least 1, top_p in (0, 1] and seed in [0, 2^32)")
