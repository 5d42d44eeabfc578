"""From `data` and `privacy_unit` to rows, one per privacy unit."""

from dpgemma.data import readers as sources
from dpgemma.data.text import examples, packing
from dpgemma.data.text.rows import Rows
from dpgemma.data.text.tokenizer import Tokenizer, check_ids

AUTO, SEQUENCE, EXAMPLE = "auto", "sequence", "example"


def rows(
    privacy_unit: str, data: str, text_field: str, tokenizer: Tokenizer, length: int, vocab_size: int
) -> tuple[str, Rows]:
    """The privacy unit and its rows.

    Args:
      privacy_unit: "sequence" packs documents into rows; "example" gives every record a row; "auto" takes the latter
        where the first record has the fields of an example. The choice is one of format and never depends on what the
        fields hold.

    Raises:
      InputError: no data, records without the fields, or tokens that the model's embedding of `vocab_size` rows does
        not have.
    """
    if privacy_unit == AUTO:
        first = next(iter(sources.records(data, text_field)), {})
        privacy_unit = EXAMPLE if examples.is_example(first) else SEQUENCE
    if privacy_unit == EXAMPLE:
        made = examples.to_rows(sources.records(data, text_field), tokenizer, length, text_field)
    else:
        made = packing.pack(sources.documents(data, text_field), tokenizer, length)
    check_ids(made.tokens, vocab_size)
    return privacy_unit, made
