"""Epsilon of a DpSgdMechanism from privacy loss distributions, with a second accountant as a check.

Formal guarantee: `Accountant.epsilon(delta, steps).upper` is an epsilon for which `steps` releases of the mechanism are
(epsilon, delta)-differentially private under its neighbouring relation: both directions are discretised pessimistically (Doroshenko
et al. 2022, arXiv 2207.04380), the cost of truncation is added to delta, and so is an allowance for the round-off of the composition.
Tested by tests/accounting/accountant_test.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting import truncation
from accounting.errors import InputError
from accounting.mechanism import ZERO_OUT, DpSgdMechanism

DISCRETISATION = 1e-4

# Round-off of the FFT composition: at 1e5 steps delta is off by up to 6e-12 in either direction, and grows with the steps.
ROUND_OFF_PER_STEP = 1e-16


@dataclasses.dataclass(frozen=True)
class EpsilonBracket:
    """Attributes:
    upper: valid upper bound, the one to report.
    lower: the optimistic end of the same discretisation.
    cross_check: epsilon by Renyi differential privacy, looser as a rule.
    """

    upper: float
    lower: float
    cross_check: float


class Accountant:
    """Epsilon of one mechanism at any number of steps; the single-step distribution is discretised once."""

    def __init__(self, mechanism: DpSgdMechanism, discretisation: float = DISCRETISATION):
        self.mechanism = mechanism
        self._discretisation = discretisation

    @functools.cached_property
    def _step(self):
        return self._poisson(pessimistic=True)

    def _poisson(self, pessimistic: bool):
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_gaussian_mechanism(
            self.mechanism.noise_multiplier,
            sampling_prob=self.mechanism.sampling_probability,
            value_discretization_interval=self._discretisation,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )

    @functools.cached_property
    def _truncated_step(self):
        import dp_accounting
        from dp_accounting.pld import privacy_loss_distribution

        m = self.mechanism
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=m.num_units,
            sampling_probability=m.sampling_probability,
            truncated_batch_size=m.max_batch_size,
            noise_multiplier=m.noise_multiplier,
            value_discretization_interval=self._discretisation,
            neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        )

    def upper(self, delta: float, steps: int | None = None) -> float:
        """The upper end alone; inf where nothing finite holds."""
        m = self.mechanism
        steps = m.steps if steps is None else steps
        _check_delta(delta)
        if steps == 0:
            return 0.0
        if not m.is_private:
            return math.inf
        round_off = ROUND_OFF_PER_STEP * steps
        composed = self._step.self_compose(steps)
        bound = _smallest_epsilon(composed, delta - round_off, lambda e: truncation.additive_delta(m, e, steps))
        # A tight cap makes the additive bound poor; the truncated distribution (arXiv 2508.15089) needs N public.
        if m.max_batch_size is not None and m.neighbouring_relation == ZERO_OUT:
            if truncation.additive_delta(m, min(bound, 50.0), steps) > 0.01 * delta:
                composed = self._truncated_step.self_compose(steps)
                bound = min(bound, _smallest_epsilon(composed, delta - round_off))
        return bound

    def epsilon(self, delta: float, steps: int | None = None) -> EpsilonBracket:
        """The bracket after `steps` releases (default: all of them).

        Raises:
          InputError: delta outside (0, 1).
          ArithmeticError: the two accountants contradict each other, so neither can be trusted.
        """
        m = self.mechanism
        steps = m.steps if steps is None else steps
        upper = self.upper(delta, steps)
        if steps == 0 or not m.is_private:
            return EpsilonBracket(upper, upper, upper)
        # What truncation takes from delta makes the Renyi bound hold for the truncated sampler as well.
        reduced = delta - truncation.additive_delta(m, upper, steps) if math.isfinite(upper) else 0.0
        cross_check = _renyi_epsilon(m, reduced, steps) if reduced > 0 else math.inf
        lower = max(0.0, float(self._poisson(pessimistic=False).self_compose(steps).get_epsilon_for_delta(delta)))
        if cross_check < lower * (1 - 1e-6):
            raise ArithmeticError(f"Renyi epsilon {cross_check} lies below the loss distribution's lower end {lower}")
        return EpsilonBracket(upper, min(lower, upper), cross_check)


def epsilon(mechanism: DpSgdMechanism, delta: float) -> EpsilonBracket:
    """The bracket of a whole run."""
    return Accountant(mechanism).epsilon(delta)


def _check_delta(delta: float):
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, got {delta:g}")


def _renyi_epsilon(mechanism: DpSgdMechanism, delta: float, steps: int) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant

    return float(rdp_privacy_accountant.RdpAccountant().compose(mechanism.event(steps)).get_epsilon(delta))


def _smallest_epsilon(distribution, delta: float, extra_delta: Callable[[float], float] = lambda epsilon: 0.0) -> float:
    """An epsilon with delta(epsilon) + extra_delta(epsilon) <= delta, within 0.01 % of the smallest; inf if there is none.

    extra_delta grows with epsilon, so it is charged at an epsilon slightly above the one returned.
    """
    epsilon = 0.0
    while True:
        ceiling = 1.0001 * epsilon + 1e-9
        remaining = delta - extra_delta(ceiling)
        if remaining <= 0:
            return math.inf
        epsilon = float(distribution.get_epsilon_for_delta(remaining))
        if epsilon <= ceiling or math.isinf(epsilon):
            return epsilon
