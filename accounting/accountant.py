"""Epsilon of one or several DP-SGD mechanisms as a certified bracket, with a second accountant as a check.

Formal guarantee: `Accountant.epsilon(delta, steps).upper` is an epsilon for which `steps` releases of the mechanisms,
one after the other on the same data, and all that was released besides (`also`), are (epsilon, delta)-differentially
private for a group of `group_size` units under their neighbouring relation, numerical error included. Adding and
removing units are both computed. Each release is replaced by a discrete loss that dominates it
(loss_distribution.privacy_loss), releases are composed with every error bounded (loss_distribution.composition), and
truncation is paid for (loss_distribution.truncation). `lower` bounds the same epsilon from below, less what truncation
may have helped.

With `replaced` the guarantee is that for two contents of one unit, neither of them empty. Given the other units and
earlier releases, a release is N or N + a under the one and N or N + b under the other, by the same coin, with |a| and
|b| at most 1. By joint convexity its hockey-stick divergence is q E[(1 - t_0 X_0 - t_1 X_1)_+] with some weights t,
where X_0 and X_1 are the likelihood ratios of N and N + b to N + a. Each is smaller in convex order than that of a
Gaussian shifted by 1 and by 2, and in that order no weighted sum is larger than that of comonotone variables (Kaas,
Dhaene and Goovaerts 2000), which are those of one Gaussian on a line: so (1 - q) N(0) + q N(1) against (1 - q) N(0) +
q N(-1) dominates. The argument needs no more of the noise than that it hides every shift as a Gaussian does.

Units of several items (`items_per_unit` = k) are groups of k items, each drawn by itself. With `replaced`, let S be
the items that were drawn, w_S its probability, and N + a_S, N + b_S the releases under the two contents, |a_S| and
|b_S| at most |S|. Under N, the divergence is E[(sum_S w_S X_(a_S) - t sum_S w_S X_(b_S))_+] with likelihood ratios X to
N: a convex function of a sum whose terms are each smaller in convex order than for |a_S| = |b_S| = |S|, and largest
where all X_a grow and all X_b fall along one line. So the binomial mixtures of N(j) and of N(-j) dominate.

Tested by
tests/accounting/oracle_test.py::test_agreement_with_dp_accounting and
tests/accounting/accountant_test.py::test_upper_end_is_above_finer_grids; for groups by
::test_groups_agree_with_dp_accountings_mixture_of_gaussians there; for units of several items by
tests/accounting/items_test.py; for contents by tests/accounting/replaced_test.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from accounting import support
from accounting.errors import InputError
from accounting.loss_distribution import privacy_loss, truncation
from accounting.loss_distribution.composition import Composition
from accounting.loss_distribution.privacy_loss import DiscreteLoss, GaussianMixturePair
from accounting.mechanism import Mechanism
from accounting.mechanism import bounds as proofs
from accounting.mechanism.noise import SMALLEST_NOISE

RELATIVE_WIDTH = 1e-3
_ABSOLUTE_WIDTH = 1e-6
_COARSEST_INTERVAL = 4e-3
# Losses that all lie within few of these intervals are given finer ones.
_FEWEST_INTERVALS = 64
_FINEST_SHARE = 1e-7  # of the coarsest interval that fits the losses
_LARGEST_GRID = 2**21
_LARGEST_OPTIMISTIC_GRID = 2**18

# Items of one owner: up to here no binomial weight that matters is lost to underflow.
LARGEST_GROUP = 256

# Share of delta that the mass beyond either end of the loss grid may take, summed over all releases.
_TAIL_SHARE = 1e-6

# Below this, dp-accounting's sums round the moments of one release to nothing, or below it.
_SMALLEST_MOMENT = 1e-12
_RENYI_ORDERS = [*range(2, 64), 72, 80, 96, 128, 192, 256, 384, 512, 1024]


@dataclasses.dataclass(frozen=True)
class EpsilonBracket:
    """Two ends between which epsilon lies, and a check by another accountant.

    Attributes:
      upper: valid upper bound, rounding and discretisation included; the one to report.
      lower: lower bound of the same epsilon by the optimistic discretisation.
      cross_check: epsilon by Renyi differential privacy, looser as a rule; inf where it is not computed: for groups,
        for contents, and for releases whose moments are too small for its arithmetic.
    """

    upper: float
    lower: float
    cross_check: float


class Accountant:
    """Epsilon after any number of steps. Discretised losses and brackets are kept and used again.

    >>> from accounting.mechanism import dp_sgd
    >>> mechanism = dp_sgd(60_000, 256, None, noise_multiplier=1.1, clip_norm=1.0, steps=1000)
    >>> round(Accountant(mechanism).upper(1e-5), 3)
    0.599

    Args:
      mechanisms: the public facts of a run, or of several runs or parts of one in their order.
      also: what was released besides, before the first step: counted whole, whatever number of steps is asked about.
      relative_width: how narrow the bracket must be: upper <= (1 + relative_width) lower, where the finest grid allows.
      group_size: units that one owner has at most; every item of these units is drawn independently.
      replaced: whether one unit's content is compared with any other content, instead of with an empty or absent unit.
      bounds: names from accounting.mechanism.bounds that may be used; by default all that hold.
      claimed: False where noise was added but no guarantee is claimed: every epsilon is then infinite, and nothing is
        computed.

    Raises:
      InputError: a combination of sampler, neighbouring relation and bound that has no proof.
    """

    def __init__(
        self,
        mechanisms: Mechanism | Sequence[Mechanism],
        relative_width: float = RELATIVE_WIDTH,
        *,
        also: Sequence[Mechanism] = (),
        group_size: int = 1,
        replaced: bool = False,
        bounds: Sequence[str] | None = None,
        claimed: bool = True,
    ) -> None:
        self.mechanisms = (mechanisms,) if isinstance(mechanisms, Mechanism) else tuple(mechanisms)
        self.also = tuple(also)
        everything = (*self.mechanisms, *self.also)
        if not self.mechanisms or group_size < 1:
            raise InputError("need at least one mechanism and a group of at least one unit")
        if len({m.neighbouring_relation for m in everything}) > 1:
            raise InputError("runs under different neighbouring relations do not compose: account for each by itself")
        for m in everything:
            support.check(m.sampling, m.neighbouring_relation, bounds or (proofs.LOSS,), group_size)
            if group_size * m.items_per_unit > LARGEST_GROUP:
                raise InputError(
                    f"{group_size * m.items_per_unit} items of one owner, each drawn by itself, are more than the"
                    f" {LARGEST_GROUP} that are accounted for: use fewer"
                )
            if group_size > m.num_units:
                raise InputError(f"a group of {group_size} units is larger than the {m.num_units} units that there are")
        self.claimed = claimed
        self._group_size, self._replaced = group_size, replaced
        self._bounds = bounds
        self._relative_width = relative_width
        self._brackets: dict[Any, tuple[float, float, float]] = {}
        self._cross_check = functools.lru_cache(maxsize=64)(self._renyi)
        self._discrete_loss = functools.lru_cache(maxsize=64)(self._discretise)

    @property
    def steps(self) -> int:
        """All steps of all mechanisms; what was released besides is no step."""
        return sum(m.steps for m in self.mechanisms)

    def epsilon(self, delta: float, steps: int | None = None) -> EpsilonBracket:
        """The bracket after `steps` releases (default: all of them).

        Raises:
          InputError: delta outside (0, 1).
          ArithmeticError: the two accountants contradict each other, so neither can be trusted.
        """
        phases = self._phases(delta, steps)
        if not phases:
            return EpsilonBracket(0.0, 0.0, 0.0)
        if not self._is_private(phases):
            return EpsilonBracket(math.inf, math.inf, math.inf)
        upper, lower, _ = self._bracket(delta, phases)
        cross_check = self._cross_check(delta, phases)
        if cross_check < lower * (1 - 1e-9):
            raise ArithmeticError(
                f"the Renyi epsilon {cross_check} lies below the loss distribution's lower bound {lower}"
            )
        return EpsilonBracket(min(upper, cross_check), lower, cross_check)

    def upper(self, delta: float, steps: int | None = None, interval: float | None = None) -> float:
        """The upper end alone; inf where nothing finite holds.

        Args:
          interval: distance of grid points; by default the one at which the bracket is narrow enough.
        """
        if interval is None:
            return self.epsilon(delta, steps).upper
        phases = self._phases(delta, steps)
        if not phases:
            return 0.0
        if not self._is_private(phases):
            return math.inf
        bound = 0.0
        for remove in self._directions:
            estimate, coarse = math.inf, self._coarsest_interval(delta, phases)
            # Coarse grids give a first estimate; if it is at most `bound`, this direction cannot raise the result.
            while coarse > 2 * interval and estimate > bound:
                estimate, coarse = self._upper(delta, phases, coarse, remove, hint=estimate), coarse / 8
            if estimate > bound and not self._within(bound, delta, phases, interval, remove):
                bound = max(bound, min(estimate, self._upper(delta, phases, interval, remove, hint=estimate)))
        return bound

    def quick_upper(self, delta: float, steps: int | None = None, tolerance: float = 5e-3) -> float:
        """An upper end that a finer grid would lower by less than about `tolerance`; for tables, where no lower end is
        asked for.
        """
        phases = self._phases(delta, steps)
        private = bool(phases) and self._is_private(phases)
        interval = self._coarsest_interval(delta, phases) if private else _COARSEST_INTERVAL
        bound = math.inf
        while True:
            previous, bound = bound, min(bound, self.upper(delta, steps, interval))
            # A grid four times finer leaves about a fifth of the excess.
            if not math.isfinite(bound) or previous - bound <= 4 * tolerance * bound:
                return bound
            interval /= 4

    def deltas(self, epsilons: Sequence[float] | np.ndarray, delta: float, steps: int | None = None) -> np.ndarray:
        """An upper bound of delta at each of the ascending `epsilons`.

        Args:
          delta: the one for which losses are discretised finely enough.
        """
        phases = self._phases(delta, steps)
        asked = np.asarray(epsilons, dtype=float)
        if not phases:
            return np.zeros(asked.size)
        if not self._is_private(phases):
            return np.ones(asked.size)
        interval = self.interval_for(delta, steps)
        plain = np.max(
            [self._composition(delta, phases, interval, remove).deltas(asked) for remove in self._directions], axis=0
        )
        extra = np.array([self._extra_delta(phases, epsilon) for epsilon in epsilons])
        # A larger epsilon never needs a larger delta.
        return np.minimum.accumulate(np.minimum(plain + extra, 1.0))

    def interval_for(self, delta: float, steps: int | None = None) -> float:
        """The interval at which the bracket is narrow enough, or the finest that is practical."""
        phases = self._phases(delta, steps)
        return self._bracket(delta, phases)[2] if phases and self._is_private(phases) else _COARSEST_INTERVAL

    def _phases(self, delta: float, steps: int | None) -> tuple[tuple[Mechanism, int], ...]:
        """Returns what was released besides and the first `steps` steps, as (one-step mechanism, number of releases),
        equal mechanisms merged."""
        if not 0 < delta < 1:
            raise InputError(f"delta must lie between 0 and 1, got {delta:g}")
        taken: dict[Mechanism, int] = {}
        left = self.steps if steps is None else steps
        parts = [(m, m.steps) for m in self.also]
        for i, m in enumerate(self.mechanisms):
            # A single mechanism may be asked about more steps than it has.
            share = left if i == len(self.mechanisms) - 1 else min(left, m.steps)
            left -= share
            parts.append((m, share))
        for m, share in parts:
            if share:
                alike = m.replace(steps=1)
                taken[alike] = taken.get(alike, 0) + m.sampling.releases(share)
        return tuple(taken.items())

    def _is_private(self, phases: Any) -> bool:
        return self.claimed and all(m.is_private for m, _ in phases)

    def _allows(self, bound: str, m: Mechanism) -> bool:
        # For contents the same bounds hold as for two units, one of which is blanked and one filled.
        units = 2 if self._replaced else self._group_size
        return bound in support.allowed(m.sampling, m.neighbouring_relation, units) and bound in (
            self._bounds or proofs.BOUNDS
        )

    @property
    def _directions(self) -> tuple[bool, ...]:
        """The directions to account for: True removes units, False adds them. One is enough without sampling, and
        where contents change places.
        """
        return (
            (True,)
            if self._replaced or all(m.sampling.inclusion_probability == 1 for m in (*self.mechanisms, *self.also))
            else (True, False)
        )

    def _bracket(self, delta: float, phases: Any) -> tuple[float, float, float]:
        """(upper, lower, interval): refined until they are close or the grid as fine as is practical."""
        if (delta, phases) in self._brackets:
            return self._brackets[delta, phases]
        coarsest, finest = self._coarsest_interval(delta, phases), self._finest_interval(delta, phases)
        interval = max(coarsest, finest)
        uppers = dict.fromkeys(self._directions, math.inf)
        upper, lower = math.inf, 0.0
        while True:
            previous_upper, previous_lower = upper, lower
            for remove in self._directions:
                if uppers[remove] > lower:  # else the other direction is known to be worse
                    uppers[remove] = min(
                        uppers[remove], self._upper(delta, phases, interval, remove, hint=uppers[remove])
                    )
            upper = max(uppers.values())
            lower = max(
                lower, self._lower(delta, phases, interval, max(uppers, key=lambda remove: uppers[remove]), hint=upper)
            )
            narrow = upper <= lower * (1 + self._relative_width) + _ABSOLUTE_WIDTH
            # Where truncation is charged on both sides, the ends stay apart however fine the grid.
            change = max(previous_upper - upper, lower - previous_lower)
            settled = change <= upper * self._relative_width / 8 if math.isfinite(upper) else math.isinf(previous_upper)
            if narrow or settled or interval / 4 < finest:
                self._brackets[delta, phases] = upper, min(lower, upper), interval
                return self._brackets[delta, phases]
            interval /= 4

    def _coarsest_interval(self, delta: float, phases: Any) -> float:
        """The interval of the first grid: a smaller one where a release's losses are tiny."""
        return min(_COARSEST_INTERVAL, self._spread(delta, phases) / _FEWEST_INTERVALS)

    def _finest_interval(self, delta: float, phases: Any) -> float:
        """The smallest interval whose grid stays within memory."""
        coarsest, spread = self._coarsest_interval(delta, phases), self._spread(delta, phases)
        return max(spread / _LARGEST_GRID, coarsest * _FINEST_SHARE)

    def _spread(self, delta: float, phases: Any) -> float:
        """The largest distance between two losses of one release that matter."""
        tail = self._tail_mass(delta, phases)
        return max(
            privacy_loss.spread(self._pair(m, remove), tail)
            for m, _ in _composed(phases)
            for remove in self._directions
        )

    def _tail_mass(self, delta: float, phases: Any) -> float:
        # Rounded to a power of ten, so that neighbouring questions share their discretisations.
        releases = sum(count for _, count in phases)
        return 10.0 ** math.floor(math.log10(max(_TAIL_SHARE * delta / releases, 1e-300)))

    def _pair(self, m: Mechanism, remove: bool) -> GaussianMixturePair:
        """The pair that dominates one release: of the group's k items j are drawn, with binomial probability, and shift
        it by j.

        For k > 1 this is the mixture-of-Gaussians mechanism (Ganesh 2024, arXiv 2401.10294).
        """
        q, k = m.sampling.inclusion_probability, self._group_size * m.items_per_unit
        rest = (1 - q) ** k
        weights = [(float(j), math.comb(k, j) * q**j * (1 - q) ** (k - j)) for j in range(1, k + 1)]
        above = tuple((shift, weight) for shift, weight in weights if weight > 0)
        below = tuple((-shift, weight) for shift, weight in above)
        if self._replaced:
            return GaussianMixturePair(m.noise_multiplier, above, below, rest, rest)
        if remove:
            return GaussianMixturePair(m.noise_multiplier, upper=above, upper_rest=rest)
        return GaussianMixturePair(m.noise_multiplier, lower=below, lower_rest=rest)

    def _discretise(self, kind: str, m: Mechanism, remove: bool, interval: float, tail_mass: float) -> DiscreteLoss:
        pair = self._pair(m, remove)
        if kind == "optimistic":
            return privacy_loss.optimistic(pair, interval, tail_mass)
        plain = privacy_loss.pessimistic(pair, interval, tail_mass)
        if kind == "truncated" and m.max_batch_size is not None:
            overflow, displaced = truncation.displacement(m)
            mixed = privacy_loss.mixture(plain, privacy_loss.pessimistic(displaced, interval, tail_mass), overflow)
            return privacy_loss.cut_tail(mixed, 100 * tail_mass)
        return plain

    def _composition(
        self, delta: float, phases: Any, interval: float, remove: bool, kind: str = "pessimistic"
    ) -> Composition:
        tail = self._tail_mass(delta, phases)
        # The truncated sampler's own loss is that of single steps.
        parts = phases if kind == "truncated" else _composed(phases)
        groups = [(self._discrete_loss(kind, m, remove, interval, tail), count) for m, count in parts]
        return Composition(groups, pessimistic=kind != "optimistic")

    def _extra_delta(self, phases: Any, epsilon: float) -> float:
        """What truncation adds to delta, by the smallest of the bounds that hold, and the ends of the noise's law."""
        total = self._tail_delta(phases, epsilon)
        for m, count in phases:
            costs = [truncation.additive_delta(m, epsilon, count)]
            if self._allows(proofs.DISPLACEMENT, m):
                costs.append(truncation.displacement_delta(m, count, self._group_size * m.items_per_unit))
            total += min(costs)
        return total

    def _tail_delta(self, phases: Any, epsilon: float) -> float:
        """What the ends of the noise's law add to delta."""
        return float(sum(m.noise.tail_delta(count, epsilon) for m, count in phases))

    def _upper(self, delta: float, phases: Any, interval: float, remove: bool, hint: float | None = None) -> float:
        plain = functools.partial(self._composition(delta, phases, interval, remove).epsilon, hint=hint)
        bound = smallest_epsilon(plain, delta, lambda epsilon: self._extra_delta(phases, epsilon))
        # Under a tight cap the added delta is poor, and the truncated sampler's own loss better.
        capped = [m for m, _ in phases if m.max_batch_size is not None]
        exact = capped and all(self._allows(proofs.TRUNCATED_LOSS, m) for m in capped)
        if exact and self._extra_delta(phases, min(bound, 50.0)) > 0.01 * delta:
            truncated = functools.partial(
                self._composition(delta, phases, interval, remove, "truncated").epsilon, hint=hint
            )
            bound = min(bound, smallest_epsilon(truncated, delta, lambda epsilon: self._tail_delta(phases, epsilon)))
        return bound

    def _lower(self, delta: float, phases: Any, interval: float, remove: bool, hint: float | None = None) -> float:
        tail = self._tail_mass(delta, phases)
        pairs = [self._pair(m, remove) for m, _ in _composed(phases)]
        if any(privacy_loss.grid_size(pair, interval, tail) > _LARGEST_OPTIMISTIC_GRID for pair in pairs):
            return 0.0
        composed = self._composition(delta, phases, interval, remove, "optimistic")
        bound = composed.epsilon(delta, hint)
        # Truncation can also help, by at most as much as the additive bound.
        extra = sum(truncation.additive_delta(m, bound, count) for m, count in phases)
        return composed.epsilon(delta + extra, hint) if 0 < extra < 1 - delta else bound if extra == 0 else 0.0

    def _within(self, epsilon: float, delta: float, phases: Any, interval: float, remove: bool) -> bool:
        """Whether delta at epsilon is known to be small enough; cheaper than solving for epsilon."""
        if epsilon <= 0:
            return False
        (needed,) = self._composition(delta, phases, interval, remove).deltas([epsilon])
        return needed + self._extra_delta(phases, epsilon) <= delta

    def _renyi(self, delta: float, phases: Any) -> float:
        moments = [
            m.sampling.inclusion_probability**2 * math.expm1(min(m.noise_multiplier**-2, 700)) for m, _ in phases
        ]
        if min(moments) < _SMALLEST_MOMENT or not all(self._allows(proofs.RENYI, m) for m, _ in phases):
            return math.inf
        from dp_accounting.rdp import rdp_privacy_accountant

        accountant = rdp_privacy_accountant.RdpAccountant(_RENYI_ORDERS)
        for m, count in phases:
            accountant.compose(m.event(count))
        return smallest_epsilon(
            lambda d: float(accountant.get_epsilon(d)), delta, lambda epsilon: self._extra_delta(phases, epsilon)
        )


def _composed(phases: Any) -> tuple[tuple[Mechanism, int], ...]:
    """The releases, those without sampling composed: T Gaussian mechanisms are one, of noise sigma / sqrt(T).

    Where that would be too little noise for a mechanism, they stay apart.
    """
    return tuple(
        (m.replace(noise_multiplier=m.noise_multiplier / math.sqrt(count)), 1)
        if m.sampling.inclusion_probability == 1 and m.noise_multiplier / math.sqrt(count) >= SMALLEST_NOISE
        else (m, count)
        for m, count in phases
    )


def epsilon(mechanism: Mechanism | Sequence[Mechanism], delta: float) -> EpsilonBracket:
    """The bracket of a whole run, or of several on the same data."""
    return Accountant(mechanism).epsilon(delta)


def smallest_epsilon(
    epsilon_at: Callable[[float], float], delta: float, extra_delta: Callable[[float], float]
) -> float:
    """An epsilon at which the composed delta and extra_delta together stay within delta; inf if there is none.

    extra_delta grows with epsilon, so it is charged at an epsilon slightly above the one that is returned.
    """
    epsilon = epsilon_at(delta)
    while math.isfinite(epsilon):
        ceiling = epsilon * (1 + 1e-6) + 1e-12
        remaining = delta - extra_delta(ceiling)
        if remaining <= 0:
            return math.inf
        epsilon = epsilon_at(remaining) if remaining < delta else epsilon
        if epsilon <= ceiling:
            return epsilon
    return math.inf
