"""What the settings say of data: how records are read, and the privacy units that they make."""

import sys

from accounting.errors import InputError
from dpgemma.choices import DOCUMENT, FIRST_ROWS, PUBLIC_OWNERS
from dpgemma.data.limits import ONE_ROW, Limits
from dpgemma.data.random_rows import RandomRows
from dpgemma.data.text import cache, units
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import Tokenizer
from dpgemma.data.text.units import Found
from dpgemma.storage import hub
from dpgemma.training.settings import Settings


def tokenizer_of(settings: Settings) -> str:
    """What `tokenizer` means where it is omitted: that of `init_from`, else bytes."""
    return settings.tokenizer or settings.init_from or tokenizer_lib.BYTE


def load_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer that the settings name.

    Raises:
      InputError: nothing of the kind there.
    """
    return tokenizer_lib.load(located_tokenizer(tokenizer_of(settings)))


def located_tokenizer(named: str) -> str:
    """Where the tokenizer lies that `tokenizer` names: a name of the hub means what was downloaded.

    Raises:
      InputError: it was not.
    """
    return named if named == tokenizer_lib.BYTE else str(hub.located(named))


def reading(settings: Settings) -> Reading:
    """How records become rows; the privacy unit may be "auto"."""
    asked = settings.units
    return Reading(
        settings.privacy_unit,
        settings.sequence_length,
        settings.text_field,
        asked.get("user_field"),
        asked.get("records_without_user"),
        asked.get("ownership") == PUBLIC_OWNERS,
    )


def records_of(
    data: str, tokenizer: Tokenizer, length: int, vocab_size: int, text_field: str, skip_bad_records: bool = False
) -> Found:
    """Records to evaluate: each is a unit, with all of its rows.

    Raises:
      InputError: data that cannot be read as records, or that are no records.
    """
    if cache.is_cache(data) or data.startswith(RandomRows.PREFIX):
        raise InputError(f"{data} holds no records to evaluate: name the files of records")
    all_rows = Limits(sys.maxsize, FIRST_ROWS, b"")
    each = Reading(DOCUMENT, length, text_field)
    return units.read(data, tokenizer, each, vocab_size, all_rows, skip_bad_records)


def read(settings: Settings, tokenizer: Tokenizer, vocab_size: int, secret: bytes) -> Found:
    """The privacy units.

    Args:
      vocab_size: rows of the model's embedding.
      secret: key by which rows are chosen of units that have too many.

    Raises:
      InputError: data that cannot be read as such units.
    """
    asked = settings.units
    limits = Limits(asked["rows_per_unit"], asked["rows_kept"], secret) if asked else ONE_ROW
    return units.read(settings.data, tokenizer, reading(settings), vocab_size, limits, settings.skip_bad_records)
