"""What a row is made of: public facts, which fix every shape of a compiled step."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Column:
    """One array of a row.

    Attributes:
      shape: of one row, without the axis of rows.
      dtype: as numpy spells it.
    """

    shape: tuple[int, ...]
    dtype: str


RowSpec = Mapping[str, Column]
