"""Rows of text: the columns that every text objective reads."""

import numpy as np

from dpgemma.data.source import InMemory
from dpgemma.data.spec import Column, RowSpec

TOKENS, SCORED = "tokens", "scored"


def spec(length: int) -> RowSpec:
    """The columns of a row of `length` tokens.

    tokens: int32; the tail of a row may be padding.
    scored: bool; the tokens whose likelihood the loss counts.
    """
    return {TOKENS: Column((length,), "int32"), SCORED: Column((length,), "bool")}


def units_of_one_row(tokens: np.ndarray, scored: np.ndarray) -> InMemory:
    """Every row [S] of both arrays [M, S] as a unit of its own."""
    return InMemory({TOKENS: tokens, SCORED: scored})
