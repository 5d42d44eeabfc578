"""Documents into rows of equal length, the privacy units of `privacy_unit`=sequence.

Formal guarantee: every token of every document lies in exactly one row, and rows do not overlap: changing one row's
content changes one privacy unit. A document longer than a row spans several units, and a short row may join several
documents. Tested by tests/data/data_test.py::test_pitfall_19_every_token_lies_in_exactly_one_row.
"""

from collections.abc import Iterable

import numpy as np

from accounting.errors import InputError
from dpgemma.data.source import InMemory
from dpgemma.data.text.rows import units_of_one_row
from dpgemma.data.text.tokenizer import Tokenizer


def pack(documents: Iterable[bytes], tokenizer: Tokenizer, length: int) -> InMemory:
    """Rows of `length` tokens: documents, each closed by eos, one after the other; the last row is filled with pad. All
    text is scored.

    Raises:
      InputError: no text at all.
    """
    pieces = []
    for document in documents:
        tokens = tokenizer.encode(document)
        if tokens.size:
            pieces += [tokens, np.array([tokenizer.eos], np.int32)]
    if not pieces:
        raise InputError("the data are empty: there is no text to train on")
    stream = np.concatenate(pieces)
    fill = (0, -stream.size % length)
    scored = np.pad(np.ones(stream.size, bool), fill)
    tokens = np.pad(stream, fill, constant_values=tokenizer.pad)
    return units_of_one_row(tokens.reshape(-1, length), scored.reshape(-1, length))
