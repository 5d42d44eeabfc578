"""Which accountant may be used for which sampler under which neighbouring relation; everything else is refused, with
the reason.
"""

from collections.abc import Iterable

from accounting.errors import InputError
from accounting.mechanism import ADD_OR_REMOVE, ZERO_OUT

# Bounds of epsilon, by what they rest on.
LOSS = "loss_distribution"  # the composed privacy loss; with a cap, what truncation costs is added to delta
ADDITIVE = "additive"  # (1 + e^epsilon) T Psi for a cap, arXiv 2411.04205
DISPLACEMENT = "displacement"  # T P[the others nearly fill the batch] for a cap
TRUNCATED_LOSS = "truncated_loss"  # the truncated sampler's own loss distribution, arXiv 2508.15089
RENYI = "renyi"  # Renyi differential privacy by dp-accounting, as the cross-check
BOUNDS = (LOSS, ADDITIVE, DISPLACEMENT, TRUNCATED_LOSS, RENYI)

ALLOWED = {
    ("poisson", ZERO_OUT): (LOSS, RENYI),
    ("poisson", ADD_OR_REMOVE): (LOSS, RENYI),
    ("full_batch", ZERO_OUT): (LOSS, RENYI),
    ("full_batch", ADD_OR_REMOVE): (LOSS, RENYI),
    ("truncated_poisson", ZERO_OUT): (LOSS, ADDITIVE, DISPLACEMENT, TRUNCATED_LOSS, RENYI),
    ("truncated_poisson", ADD_OR_REMOVE): (LOSS, ADDITIVE, RENYI),
    ("fixed", ZERO_OUT): (LOSS, RENYI),
    ("fixed", ADD_OR_REMOVE): (),
}
# What still holds for a group of several units.
_FOR_GROUPS = (LOSS, ADDITIVE, DISPLACEMENT)


def _reason(scheme: str, relation: str, bound: str, group_size: int) -> str:
    if (scheme, relation) == ("fixed", ADD_OR_REMOVE):
        return "adding or removing a unit moves the others between fixed batches: use zero_out, or Poisson sampling"
    if scheme == "truncated_poisson" and relation == ADD_OR_REMOVE and bound in (DISPLACEMENT, TRUNCATED_LOSS):
        return (
            "it needs a public number of units, which add_or_remove keeps private: use zero_out, or the additive bound"
        )
    if group_size > 1 and bound not in _FOR_GROUPS:
        return "it is derived for one unit, not for a group: use the loss distribution"
    return f"it is a bound for a truncated batch, and {scheme} sampling has none"


def allowed(scheme: str, relation: str, group_size: int = 1) -> tuple[str, ...]:
    """The bounds that hold; the smallest of them is epsilon."""
    bounds = ALLOWED.get((scheme, relation), ())
    return tuple(bound for bound in bounds if group_size == 1 or bound in _FOR_GROUPS)


def check(scheme: str, relation: str, bounds: Iterable[str] = (LOSS,), group_size: int = 1) -> None:
    """Passes only combinations that have a proof.

    Raises:
      InputError: names the combination and the reason.
    """
    for bound in bounds:
        if bound not in BOUNDS:
            raise InputError(f"unknown bound {bound!r}: use one of {', '.join(BOUNDS)}")
        if bound not in allowed(scheme, relation, group_size):
            reason = _reason(scheme, relation, bound, group_size)
            raise InputError(f"{bound} does not hold for {scheme} sampling under {relation}: {reason}")
