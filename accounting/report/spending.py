"""What a run has spent, in the numbers that its report states."""

import dataclasses
from collections.abc import Callable

from accounting.accountant import Accountant, EpsilonBracket
from accounting.ledger import events
from accounting.ledger.executed import Executed


@dataclasses.dataclass(frozen=True)
class Spent:
    """The numbers of a report.

    Attributes:
      bracket: epsilon for a unit that is there or is empty (or absent).
      replaced: epsilon for a unit with one content or another, at the same delta; None in reports of older formats,
        which do not state it.
    """

    bracket: EpsilonBracket
    replaced: float | None = None


def spent(executed: Executed, accountant: Accountant, make: Callable[..., Accountant] = Accountant) -> Spent:
    """What the executed steps, and what was released beside them, have spent.

    Args:
      accountant: of the executed mechanisms, or of the planned one.
      make: what makes another accountant.
    """
    bracket = accountant.epsilon(executed.delta, executed.steps)
    if executed.version < events.PLACES:
        return Spent(bracket)
    contents = make(accountant.mechanisms, also=accountant.also, replaced=True, claimed=accountant.claimed)
    return Spent(bracket, contents.quick_upper(executed.delta, executed.steps))
