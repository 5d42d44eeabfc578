"""Rows of tokens: what a privacy unit is once it is in memory."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """Attributes:
    tokens: int32 [M, S]; the tail of a row may be padding.
    scored: bool [M, S]; the tokens whose likelihood the loss counts.
    """

    tokens: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: np.ndarray, slots: int) -> dict[str, np.ndarray]:
        """The named rows in front and zeros behind, as arrays [slots, S]."""
        taken = {}
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            taken[field.name] = np.zeros((slots, column.shape[1]), column.dtype)
            taken[field.name][: len(numbers)] = column[numbers]
        return taken
