"""Which bound may be used for which sampling under which neighbouring relation; everything else is refused, with the
reason.
"""

from collections.abc import Iterable

from accounting.errors import InputError
from accounting.mechanism.bounds import BOUNDS, DISPLACEMENT, FOR_GROUPS, LOSS, TRUNCATED_LOSS
from accounting.mechanism.sampling import ADD_OR_REMOVE, Fixed, Sampling, TruncatedPoisson


def _reason(sampling: Sampling, relation: str, bound: str, group_size: int) -> str:
    if sampling.shared_items is not None and relation == ADD_OR_REMOVE:
        return "what a unit shares with others does not go with it: use zero_out"
    if isinstance(sampling, Fixed) and sampling.items_per_unit > 1:
        return "batches that are laid out beforehand have no proof for several items of a unit: use Poisson sampling"
    if isinstance(sampling, Fixed) and relation == ADD_OR_REMOVE:
        return "adding or removing a unit moves the others between fixed batches: use zero_out, or Poisson sampling"
    truncated = isinstance(sampling, TruncatedPoisson)
    if truncated and relation == ADD_OR_REMOVE and bound in (DISPLACEMENT, TRUNCATED_LOSS):
        return (
            "it needs a public number of units, which add_or_remove keeps private: use zero_out, or the additive bound"
        )
    if group_size * sampling.items_per_unit > 1 and bound not in FOR_GROUPS:
        return "it is derived for a unit of one item, not for several: use the loss distribution"
    return f"it is a bound for a truncated batch, and {sampling.scheme} sampling has none"


def allowed(sampling: Sampling, relation: str, group_size: int = 1) -> tuple[str, ...]:
    """The bounds that hold for a group of so many units; the smallest of them is epsilon."""
    single = group_size * sampling.items_per_unit == 1
    return tuple(bound for bound in sampling.bounds(relation) if single or bound in FOR_GROUPS)


def check(sampling: Sampling, relation: str, bounds: Iterable[str] = (LOSS,), group_size: int = 1) -> None:
    """Passes only combinations that have a proof.

    Raises:
      InputError: names the combination and the reason.
    """
    for bound in bounds:
        if bound not in BOUNDS:
            raise InputError(f"unknown bound {bound!r}: use one of {', '.join(BOUNDS)}")
        if bound not in allowed(sampling, relation, group_size):
            reason = _reason(sampling, relation, bound, group_size)
            raise InputError(f"{bound} does not hold for {sampling.scheme} sampling under {relation}: {reason}")
