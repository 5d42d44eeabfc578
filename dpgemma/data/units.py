"""From --data and --privacy_unit to rows, one per privacy unit."""

from dpgemma.data import examples, packing, sources
from dpgemma.data.rows import Rows
from dpgemma.gemma.tokenizer import Tokenizer

AUTO, SEQUENCE, EXAMPLE = "auto", "sequence", "example"


def rows(privacy_unit: str, data: str, text_field: str, tokenizer: Tokenizer, length: int) -> tuple[str, Rows]:
    """The privacy unit and its rows.

    Args:
      privacy_unit: "sequence" packs documents into rows; "example" gives every record a row; "auto" takes the latter where the first
        record has the fields of an example. The choice is one of format and never depends on what the fields hold.

    Raises:
      InputError: no data, or records without the fields.
    """
    if privacy_unit == AUTO:
        first = next(iter(sources.records(data, text_field)), {})
        privacy_unit = EXAMPLE if examples.is_example(first) else SEQUENCE
    if privacy_unit == EXAMPLE:
        return EXAMPLE, examples.to_rows(sources.records(data, text_field), tokenizer, length, text_field)
    return SEQUENCE, packing.pack(sources.documents(data, text_field), tokenizer, length)
