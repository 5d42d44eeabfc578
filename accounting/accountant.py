"""Epsilon of a DpSgdMechanism as a certified bracket, with a second accountant as a check.

Formal guarantee: `Accountant.epsilon(delta, steps).upper` is an epsilon for which `steps` releases of the mechanism are
(epsilon, delta)-differentially private under its neighbouring relation, numerical error included. Adding and removing a unit are both
computed; each release is replaced by a discrete loss that dominates it (accounting.privacy_loss), releases are composed with every
error bounded (accounting.composition), and truncation is paid for (accounting.truncation). `lower` bounds the same epsilon from below.
Tested by tests/accounting/accountant_test.py::test_bracket_holds_dp_accounting_values and ::test_upper_end_is_above_finer_grids.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting import privacy_loss, truncation
from accounting.composition import Composition
from accounting.errors import InputError
from accounting.mechanism import ZERO_OUT, DpSgdMechanism
from accounting.privacy_loss import DiscreteLoss, GaussianMixturePair

RELATIVE_WIDTH = 1e-3
_ABSOLUTE_WIDTH = 1e-6
_COARSEST_INTERVAL = 4e-3
_FINEST_INTERVAL = 1e-7
_LARGEST_GRID = 2**21
_LARGEST_OPTIMISTIC_GRID = 2**18

# Mass of one release's loss beyond the grid, all steps together, as a share of delta.
_TAIL_SHARE = 1e-6

_RENYI_ORDERS = [*range(2, 64), 72, 80, 96, 128, 192, 256, 384, 512, 1024]


@dataclasses.dataclass(frozen=True)
class EpsilonBracket:
    """Attributes:
    upper: valid upper bound, rounding and discretisation included; the one to report.
    lower: lower bound of the same epsilon by the optimistic discretisation.
    cross_check: epsilon by Renyi differential privacy, looser as a rule.
    """

    upper: float
    lower: float
    cross_check: float


class Accountant:
    """Epsilon of one mechanism at any number of steps. Discretised losses are kept and used again.

    Args:
      mechanism: the public facts of the run.
      relative_width: how narrow the bracket must be: upper <= (1 + relative_width) lower, where the finest grid allows.
    """

    def __init__(self, mechanism: DpSgdMechanism, relative_width: float = RELATIVE_WIDTH):
        self.mechanism = mechanism
        self._relative_width = relative_width
        self._narrow = {}
        self._discrete_loss = functools.lru_cache(maxsize=16)(self._discretise)

    def upper(self, delta: float, steps: int | None = None, interval: float | None = None) -> float:
        """The upper end alone; inf where nothing finite holds.

        Args:
          interval: distance of grid points; by default the one at which the bracket is narrow enough.
        """
        if interval is None:
            return self.epsilon(delta, steps).upper
        steps = self._checked(delta, steps)
        if steps == 0:
            return 0.0
        if not self.mechanism.is_private:
            return math.inf
        bound = 0.0
        for remove in self._directions:
            estimate, coarse = math.inf, _COARSEST_INTERVAL
            # Coarse grids show where epsilon lies, and often that this direction does not matter.
            while coarse > 2 * interval and estimate > bound:
                estimate, coarse = self._upper(delta, steps, coarse, remove, hint=estimate), coarse / 8
            if estimate > bound:
                bound = max(bound, min(estimate, self._upper(delta, steps, interval, remove, hint=estimate)))
        return bound

    def epsilon(self, delta: float, steps: int | None = None) -> EpsilonBracket:
        """The bracket after `steps` releases (default: all of them).

        Raises:
          InputError: delta outside (0, 1).
          ArithmeticError: the two accountants contradict each other, so neither can be trusted.
        """
        steps = self._checked(delta, steps)
        if steps == 0:
            return EpsilonBracket(0.0, 0.0, 0.0)
        if not self.mechanism.is_private:
            return EpsilonBracket(math.inf, math.inf, math.inf)
        upper, lower = self._bracket(delta, steps)
        # Truncation's share of delta, at the bound, makes the Renyi bound hold for the truncated sampler too.
        remaining = delta - truncation.additive_delta(self.mechanism, upper, steps) if math.isfinite(upper) else 0.0
        cross_check = _renyi_epsilon(self.mechanism, remaining, steps) if remaining > 0 else math.inf
        if cross_check < lower * (1 - 1e-9):
            raise ArithmeticError(f"the Renyi epsilon {cross_check} lies below the loss distribution's lower bound {lower}")
        return EpsilonBracket(min(upper, cross_check), lower, cross_check)

    def interval_for(self, delta: float, steps: int | None = None) -> float:
        """The interval at which the bracket is narrow enough, or the finest that is practical."""
        steps = self._checked(delta, steps)
        if not self.mechanism.is_private:
            return _COARSEST_INTERVAL
        if (delta, steps) not in self._narrow:
            self._bracket(delta, steps)
        return self._narrow[delta, steps]

    def _bracket(self, delta: float, steps: int) -> tuple[float, float]:
        finest = self._finest_interval(delta, steps)
        interval = max(_COARSEST_INTERVAL, finest)
        uppers = dict.fromkeys(self._directions, math.inf)
        upper, lower = math.inf, 0.0
        while True:
            previous_upper, previous_lower = upper, lower
            for remove in self._directions:
                if uppers[remove] > lower:  # else the other direction is known to be worse
                    uppers[remove] = min(uppers[remove], self._upper(delta, steps, interval, remove, hint=uppers[remove]))
            upper = max(uppers.values())
            lower = max(lower, self._lower(delta, steps, interval, max(uppers, key=uppers.get), hint=upper))
            narrow = upper <= lower * (1 + self._relative_width) + _ABSOLUTE_WIDTH
            # Where truncation is charged on both sides, the ends stay apart however fine the grid.
            change = max(previous_upper - upper, lower - previous_lower)
            settled = change <= upper * self._relative_width / 8 if math.isfinite(upper) else math.isinf(previous_upper)
            if narrow or settled or interval / 4 < finest:
                self._narrow[delta, steps] = interval
                return upper, min(lower, upper)
            interval /= 4

    def _finest_interval(self, delta: float, steps: int) -> float:
        """The smallest interval whose grid stays within memory."""
        sizes = [privacy_loss.grid_size(pair, 1e-3, self._tail_mass(delta, steps)) for pair in map(self._pair, self._directions)]
        return max(1e-3 * max(sizes) / _LARGEST_GRID, _FINEST_INTERVAL)

    def _checked(self, delta: float, steps: int | None) -> int:
        if not 0 < delta < 1:
            raise InputError(f"delta must lie between 0 and 1, got {delta:g}")
        return self.mechanism.steps if steps is None else steps

    @property
    def _directions(self) -> tuple[bool, ...]:
        """Whether the unit is removed, or added; the two are alike where every step uses all units."""
        return (True,) if self.mechanism.sampling_probability == 1 else (True, False)

    def _tail_mass(self, delta: float, steps: int) -> float:
        # Rounded to a power of ten, so that neighbouring questions share their discretisations.
        return 10.0 ** math.floor(math.log10(max(_TAIL_SHARE * delta / steps, 1e-300)))

    def _pair(self, remove: bool) -> GaussianMixturePair:
        q, sigma = self.mechanism.sampling_probability, self.mechanism.noise_multiplier
        return GaussianMixturePair(sigma, upper=((1.0, q),)) if remove else GaussianMixturePair(sigma, lower=((-1.0, q),))

    def _discretise(self, kind: str, remove: bool, interval: float, tail_mass: float) -> DiscreteLoss:
        if kind == "optimistic":
            return privacy_loss.optimistic(self._pair(remove), interval, tail_mass)
        plain = privacy_loss.pessimistic(self._pair(remove), interval, tail_mass)
        if kind == "truncated":
            overflow, displaced = truncation.displacement(self.mechanism)
            mixed = privacy_loss.mixture(plain, privacy_loss.pessimistic(displaced, interval, tail_mass), overflow)
            return privacy_loss.cut_tail(mixed, 100 * tail_mass)
        return plain

    def _upper(self, delta: float, steps: int, interval: float, remove: bool, hint: float | None = None) -> float:
        m, tail = self.mechanism, self._tail_mass(delta, steps)
        compose = lambda kind: Composition([(self._discrete_loss(kind, remove, interval, tail), steps)], pessimistic=True)
        plain = functools.partial(compose("pessimistic").epsilon, hint=hint)
        bound = _smallest_epsilon(plain, delta, lambda e: truncation.additive_delta(m, e, steps))
        # Under a tight cap the additive bound is poor; the truncated sampler's own loss needs the number of units to be public.
        if m.max_batch_size is not None and m.neighbouring_relation == ZERO_OUT:
            share = truncation.additive_delta(m, min(bound, 50.0), steps) / delta
            if share > 0.01:
                bound = min(bound, compose("truncated").epsilon(delta, hint))
        return bound

    def _lower(self, delta: float, steps: int, interval: float, remove: bool, hint: float | None = None) -> float:
        if privacy_loss.grid_size(self._pair(remove), interval, self._tail_mass(delta, steps)) > _LARGEST_OPTIMISTIC_GRID:
            return 0.0
        loss = self._discrete_loss("optimistic", remove, interval, self._tail_mass(delta, steps))
        composed = Composition([(loss, steps)], pessimistic=False)
        # Truncation can also help, by at most as much as it can cost.
        bound = composed.epsilon(delta, hint)
        extra = truncation.additive_delta(self.mechanism, bound, steps)
        return composed.epsilon(delta + extra, hint) if 0 < extra < 1 - delta else bound if extra == 0 else 0.0


def epsilon(mechanism: DpSgdMechanism, delta: float) -> EpsilonBracket:
    """The bracket of a whole run."""
    return Accountant(mechanism).epsilon(delta)


def _renyi_epsilon(mechanism: DpSgdMechanism, delta: float, steps: int) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant

    accountant = rdp_privacy_accountant.RdpAccountant(_RENYI_ORDERS)
    return float(accountant.compose(mechanism.event(steps)).get_epsilon(delta))


def _smallest_epsilon(epsilon_at: Callable[[float], float], delta: float, extra_delta: Callable[[float], float]) -> float:
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
