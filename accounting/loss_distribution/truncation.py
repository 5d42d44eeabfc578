"""What it costs to cut a Poisson batch at a maximum size, and how large that maximum should be."""

import functools
import math

from accounting.loss_distribution.privacy_loss import GaussianMixturePair
from accounting.mechanism import Mechanism


@functools.lru_cache
def overflow_probability(num_items: int, sampling_probability: float, max_batch_size: int) -> float:
    """Psi = P[Binomial(N, q) > max_batch_size], N items that are drawn."""
    from scipy import stats

    return float(stats.binom.sf(max_batch_size, num_items, sampling_probability))


def additive_delta(mechanism: Mechanism, epsilon: float, steps: int) -> float:
    """(1 + e^epsilon) T Psi, added to delta by truncation at any epsilon, under any neighbouring relation and for any
    group of units.

    Each data set's truncated run differs from its plain Poisson run only where some batch overflows: total variation at
    most T Psi on either side (Chua et al. 2024, arXiv 2411.04205, section 3). The larger of the neighbours, with all
    items, bounds both. Tested by
    tests/accounting/accountant_test.py::test_pitfall_28_truncation_is_charged_by_the_additive_bound_under_add_or_remove.
    """
    if mechanism.max_batch_size is None:
        return 0.0
    q = mechanism.sampling_probability
    return (
        (1 + math.exp(min(epsilon, 700.0)))
        * steps
        * overflow_probability(mechanism.num_items, q, mechanism.max_batch_size)
    )


def displacement_delta(mechanism: Mechanism, steps: int, group_items: int | None = None) -> float:
    """T P[Binomial(N - k, q) > max_batch_size - k], added to delta by truncation at any epsilon, under zero_out.
    Batches are drawn from N items, k of which belong to the group (by default those of one unit).

    An emptied item keeps its place in the draw, so the draws of neighbours are the same. While the items outside the
    group leave room for all k of it, nothing is cut and the step is a plain Poisson step; in the rare other case the
    step is given up for lost.

    Formal guarantee: a truncated run is (epsilon, delta + this)-differentially private for groups of k where its plain
    Poisson run is (epsilon, delta)-differentially private. Tested by tests/accounting/accountant_test.py::
    test_displacement_bound_covers_a_brute_force_of_the_truncated_sampler and
    ::test_pitfall_28_a_capped_group_pays_for_what_truncation_may_reveal.
    """
    if mechanism.max_batch_size is None:
        return 0.0
    k = mechanism.items_per_unit if group_items is None else group_items
    others, room = max(mechanism.num_items - k, 0), mechanism.max_batch_size - k
    return min(1.0, steps * overflow_probability(others, mechanism.sampling_probability, room))


def displacement(mechanism: Mechanism) -> tuple[float, GaussianMixturePair]:
    """What truncation does in one step beyond leaving units out: the unit may push another one out of the batch.

    Returns:
      The probability that the other units fill the batch, and a pair that dominates the release in that case. Under
      zero_out the loss of a step is the plain one, or with that probability this one (arXiv 2508.15089, in the form
      that dp-accounting 0.6 uses).
    """
    from scipy import stats

    m, q, cap = mechanism, mechanism.sampling_probability, mechanism.max_batch_size
    assert cap is not None, "without a cap nothing is displaced"
    full = float(stats.binom.sf(cap - 1, m.num_items - 1, q))
    if full == 0.0:
        return 0.0, GaussianMixturePair(m.noise_multiplier, upper=((1.0, q),))
    kept = overflow_probability(m.num_items, q, cap) * cap / full / m.num_items
    return full, GaussianMixturePair(
        m.noise_multiplier / 2, upper=((1.0, min(kept, 1.0)),), lower=((-1.0, min(kept, 1.0)),)
    )


def plan_max_batch_size(
    num_items: int,
    expected_batch_size: float,
    steps: int,
    epsilon: float,
    delta: float,
    *,
    share: float = 1e-3,
    multiple: int = 1,
) -> int:
    """The smallest cap, a multiple of `multiple`, at which truncation costs at most `share` of delta, under either
    relation.

    Without a finite epsilon the cap is planned as for epsilon = 20, so that the run has the same shape.

    Args:
      num_items: what batches are drawn from: units, or the items of all units.
    """
    epsilon = min(epsilon, 20.0)
    q = expected_batch_size / num_items
    allowed = share * delta / ((1 + math.exp(epsilon)) * max(steps, 1))
    # scipy's inverse loses the tail below 1e-16 and answers num_items, which would be the size of every batch in
    # memory.
    low, cap = math.ceil(expected_batch_size) - 1, num_items
    while cap - low > 1:
        middle = (low + cap) // 2
        low, cap = (low, middle) if overflow_probability(num_items, q, middle) <= allowed else (middle, cap)
    return -(-cap // multiple) * multiple
