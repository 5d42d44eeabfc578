"""What a run's or a plan's epsilon means, as tables: owners of several units, attacks, other epsilons."""

import dataclasses
import math
from typing import Any

from accounting import conversions
from accounting.accountant import LARGEST_GROUP, Accountant
from accounting.conversions import PrivacyProfile

GROUP_SIZES = (1, 2, 3, 7)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What an epsilon means, in numbers.

    Attributes:
      groups: (k, epsilon) for an owner of k units, at the same delta; inf where no finite bound holds.
      attacks: (false-positive rate, largest true-positive rate of any membership attack at it).
      inferences: (rate of right guesses about what one unit holds, where it took no part; largest such rate where it
        did) (accounting.risk).
      deltas: (epsilon, delta) at some round epsilons.
      membership_advantage: largest difference of the two rates.
      gaussian_mu: mu of the Gaussian mechanism that is nowhere more private, down to delta.
      profile: delta at many epsilons, for plots; None without a guarantee.
    """

    groups: tuple[tuple[int, float], ...]
    attacks: tuple[tuple[float, float], ...]
    inferences: tuple[tuple[float, float], ...]
    deltas: tuple[tuple[float, float], ...]
    membership_advantage: float
    gaussian_mu: float
    profile: PrivacyProfile | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "groups": [{"units": k, "epsilon": epsilon} for k, epsilon in self.groups],
            "attacks": [{"false_positive_rate": fpr, "true_positive_rate": tpr} for fpr, tpr in self.attacks],
            "inferences": [{"prior": prior, "right_guesses": rate} for prior, rate in self.inferences],
            "deltas": [{"epsilon": epsilon, "delta": delta} for epsilon, delta in self.deltas],
            "membership_advantage": self.membership_advantage,
            "gaussian_mu": self.gaussian_mu,
        }


def meaning(accountant: Accountant, delta: float) -> Meaning:
    """The tables of everything that an accountant accounts for."""
    mechanisms, also = accountant.mechanisms, accountant.also
    epsilon = accountant.epsilon(delta).upper
    if not math.isfinite(epsilon):
        hopeless = tuple((rate, 1.0) for rate in conversions.FALSE_POSITIVE_RATES)
        known = tuple((prior, 1.0) for prior in conversions.PRIORS)
        return Meaning(tuple((k, math.inf) for k in GROUP_SIZES), hopeless, known, (), 1.0, math.inf, None)
    largest = min(min(m.num_units, LARGEST_GROUP // m.items_per_unit) for m in mechanisms)
    sizes = [k for k in GROUP_SIZES if k <= largest]
    groups = [
        (k, epsilon if k == 1 else Accountant(mechanisms, also=also, group_size=k).quick_upper(delta)) for k in sizes
    ]
    profile = conversions.profile(accountant, delta, epsilon)
    attacks = [(rate, profile.true_positive_rate(rate)) for rate in conversions.FALSE_POSITIVE_RATES]
    inferences = [(prior, profile.true_positive_rate(prior)) for prior in conversions.PRIORS]
    deltas = [(e, delta if e == epsilon else profile.delta(e)) for e in _round_epsilons(epsilon)]
    # A larger group never has a smaller epsilon; a coarser grid may say so by a hair.
    groups = [(k, max(e for _, e in groups[: i + 1])) for i, (k, _) in enumerate(groups)]
    return Meaning(
        tuple(groups),
        tuple(attacks),
        tuple(inferences),
        tuple(deltas),
        profile.membership_advantage,
        profile.gaussian_mu(delta),
        profile,
    )


def _round_epsilons(epsilon: float) -> list[float]:
    """0, some simple shares of epsilon, and epsilon itself."""
    return [0.0, *(float(f"{share * epsilon:.2g}") for share in (0.125, 0.25, 0.5)), epsilon]


def text(result: Meaning) -> str:
    """The tables for a terminal."""
    from accounting.rounding import round_up, upper

    lines = ["", "units of one owner   epsilon"]
    lines += [f"{k:>18}   {upper(round_up(epsilon), 10)}" for k, epsilon in result.groups]
    lines += ["", "false-positive rate  true-positive rate of any membership attack, at most"]
    lines += [f"{rate:>19g}  {upper(detected, 4)}" for rate, detected in result.attacks]
    lines += ["", "right guesses before  right guesses of what one unit holds, at most"]
    lines += [f"{prior:>20g}  {upper(rate, 4)}" for prior, rate in result.inferences]
    lines += ["", "            epsilon  delta"]
    lines += [f"{upper(epsilon):>19}  {upper(delta, 4)}" for epsilon, delta in result.deltas]
    lines += [
        "",
        f"membership advantage at most {upper(result.membership_advantage, 4)}; Gaussian mu at most"
        f" {upper(result.gaussian_mu, 4)}",
    ]
    return "\n".join(lines)
