"""A breach of privacy that can be planted."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One breach.

    Attributes:
      kind: of which it is a member.
      what: one line.
      file: that is changed.
      old, new: text that occurs once, and what takes its place.
      tests: arguments of pytest; at least one of these tests must fail.
    """

    kind: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SLOW_TOO = ("-m", "slow or not slow")  # among the tests of a mutation that a slow one notices
