import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from accounting import accountant, calibration
from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from accounting.errors import InputError
from accounting.loss_distribution import truncation
from accounting.mechanism import ADD_OR_REMOVE, ZERO_OUT, dp_sgd, histogram
from accounting.report import tables

VAULTGEMMA = dp_sgd(12_695_312_500, 517_989, None, 0.614, 1.0, 100_000)


def mechanism(q=0.01, sigma=1.0, steps=1000, units=1_000_000, cap=None, relation=ADD_OR_REMOVE):
    return dp_sgd(units, q * units, cap, sigma, 1.0, steps, relation)


def test_upper_end_is_above_finer_grids():
    m = mechanism(0.01, 0.8, 500)
    uppers = [Accountant(m).upper(1e-6, interval=interval) for interval in (1e-3, 1e-4, 1e-5)]
    assert uppers[0] >= uppers[1] >= uppers[2] > 0
    assert Accountant(m).epsilon(1e-6).upper >= uppers[2] * (1 - 1e-12)


def gaussian_delta(epsilon, mu):
    """Balle and Wang 2018, theorem 8."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("mu, delta", [(0.3, 1e-6), (1.0, 1e-5), (2.5, 1e-9)])
def test_full_batch_equals_the_gaussian_closed_form(mu, delta):
    # T releases with noise sigma are one Gaussian mechanism with mu = sqrt(T) / sigma.
    m = mechanism(q=1.0, sigma=math.sqrt(25) / mu, steps=25)
    exact = optimize.brentq(lambda e: gaussian_delta(e, mu) - delta, 0, 100, xtol=1e-12)
    bracket = Accountant(m).epsilon(delta)
    assert bracket.lower <= exact <= bracket.upper
    assert bracket.upper <= exact * 1.001


def test_one_step_equals_the_closed_form_of_the_subsampled_gaussian():
    q, sigma, delta = 0.1, 0.8, 1e-4

    def delta_at(epsilon):
        # Removing: the worst event is x > x*, where the likelihood ratio passes e^epsilon.
        x = sigma**2 * math.log((math.exp(epsilon) - 1 + q) / q) + 0.5

        def tail(mean):
            return stats.norm.sf((x - mean) / sigma)

        return (1 - q) * tail(0) + q * tail(1) - math.exp(epsilon) * tail(0)

    exact = optimize.brentq(lambda e: delta_at(e) - delta, 1e-6, 50, xtol=1e-13)
    bracket = Accountant(mechanism(q, sigma, 1)).epsilon(delta)
    assert bracket.lower <= exact <= bracket.upper


@settings(max_examples=10, deadline=None, derandomize=True)
@given(q=st.floats(1e-4, 0.5), sigma=st.floats(0.6, 5), steps=st.integers(1, 2000), delta=st.floats(1e-9, 1e-3))
def test_pitfall_26_epsilon_is_monotone(q, sigma, steps, delta):
    def at(delta=delta, **changes):
        return Accountant(mechanism(**{"q": q, "sigma": sigma, "steps": steps, **changes})).epsilon(delta)

    base = at()
    slack = 1e-9
    assert at(steps=2 * steps).upper >= base.lower - slack
    assert at(q=q / 2).lower <= base.upper + slack
    assert at(sigma=1.2 * sigma).lower <= base.upper + slack
    assert at(delta=delta / 10).upper >= base.lower - slack


def test_renyi_cross_check_is_dp_accountings_and_looser():
    m = mechanism(512 / 50_000, 1.0, 5000)
    bracket = Accountant(m).epsilon(1e-5)
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(512 / 50_000, dp_accounting.GaussianDpEvent(1.0)), 5000
    )
    renyi = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
    assert bracket.cross_check == pytest.approx(renyi, rel=1e-2)
    assert bracket.upper < bracket.cross_check
    assert bracket.upper == pytest.approx(4.3167, rel=1e-3)  # dp-accounting 0.6.0, grid 1e-4


def test_a_run_in_parts_costs_what_it_costs_whole():
    whole, parts = mechanism(steps=1000), [mechanism(steps=300), mechanism(steps=700)]
    assert Accountant(parts).epsilon(1e-6) == Accountant(whole).epsilon(1e-6)
    changed = [mechanism(steps=300), mechanism(steps=700, sigma=0.8)]
    mixed = Accountant(changed).epsilon(1e-6)
    assert mixed.lower > Accountant(whole).epsilon(1e-6).upper
    assert mixed.upper < Accountant(mechanism(steps=1000, sigma=0.8)).epsilon(1e-6).lower
    assert Accountant(changed).epsilon(1e-6, steps=300) == Accountant(mechanism(steps=300)).epsilon(1e-6)


def test_heterogeneous_steps_agree_with_dp_accounting():
    settings = [(0.01, 0.8, 200), (0.05, 2.0, 300), (0.002, 0.6, 500)]
    composed = None
    for q, sigma, steps in settings:
        step = privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=1e-4
        )
        part = step.self_compose(steps)
        composed = part if composed is None else composed.compose(part)
    ours = Accountant([mechanism(*setting) for setting in settings]).epsilon(1e-6)
    assert ours.lower * (1 - 5e-4) <= composed.get_epsilon_for_delta(1e-6) <= ours.upper * (1 + 5e-4)


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE, ZERO_OUT])
@pytest.mark.parametrize("noise", [3.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_what_is_released_besides_agrees_with_dp_accounting(relation, noise):
    """A Gaussian release of everybody beside subsampled steps; whatever number of steps is asked about."""
    steps, counts = mechanism(0.02, 0.9, 200, relation=relation), histogram(1_000_000, noise, relation)
    known = Accountant(steps, also=[counts])
    for count in (0, 50, 200):
        theirs = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
        theirs.compose(dp_accounting.GaussianDpEvent(noise))
        if count:
            theirs.compose(steps.event(count))
        assert known.upper(1e-6, count) == pytest.approx(theirs.get_epsilon(1e-6), rel=2e-3)
        assert known.upper(1e-6, count) > Accountant(steps).upper(1e-6, count)
    alone = optimize.brentq(lambda epsilon: gaussian_delta(epsilon, 1 / noise) - 1e-6, 0, 50)
    assert alone <= known.upper(1e-6, 0) <= alone * 1.002
    assert known.steps == 200 and EpsilonCurve(known, 1e-6).at(0) >= alone
    for many in (2, 3):
        group = Accountant(steps, also=[counts], group_size=many).quick_upper(1e-6, 0)
        wanted = optimize.brentq(lambda epsilon, k=many: gaussian_delta(epsilon, k / noise) - 1e-6, 0, 50)
        assert wanted <= group <= wanted * 1.01
    told, plain = (dict(tables.meaning(a, 1e-6).groups) for a in (known, Accountant(steps)))
    assert all(told[k] > plain[k] for k in told)
    contents = Accountant(steps, also=[counts], replaced=True).quick_upper(1e-6, 0)
    assert contents == pytest.approx(Accountant(steps, also=[counts], group_size=2).quick_upper(1e-6, 0), rel=1e-2)


def test_every_solver_leaves_room_for_what_is_released_besides():
    plan, also = mechanism(0.02, 1.0, 200, units=50_000), [histogram(50_000, 2.0, ADD_OR_REMOVE)]
    solved = calibration.noise_multiplier(plan, 4.0, 1e-5, also=also)
    assert 3.99 < Accountant(solved, also=also).upper(1e-5) <= 4
    assert solved.noise_multiplier > calibration.noise_multiplier(plan, 4.0, 1e-5).noise_multiplier * 1.05
    solved = solved.replace(noise_multiplier=solved.noise_multiplier * 1.01)
    for solve in (calibration.steps, calibration.expected_batch_size, calibration.num_units):
        found = solve(solved, 4.0, 1e-5, also=also)
        assert 3.9 < Accountant(found, also=also).upper(1e-5) <= 4 < Accountant(found, also=also * 8).upper(1e-5)
        with pytest.raises(InputError, match=r"by itself, and the target is 0\.5"):
            solve(solved, 0.5, 1e-5, also=also)
    with pytest.raises(InputError, match="different neighbouring relations"):
        Accountant(plan, also=[histogram(50_000, 2.0, ZERO_OUT)])


def test_delta_at_any_epsilon_is_the_inverse_of_epsilon_at_delta():
    a = Accountant(mechanism(0.02, 0.8, 300))
    epsilons = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    deltas = a.deltas(epsilons, 1e-6)
    step = privacy_loss_distribution.from_gaussian_mechanism(
        0.8, sampling_prob=0.02, value_discretization_interval=1e-4
    )
    theirs = np.array([step.self_compose(300).get_delta_for_epsilon(e) for e in epsilons])
    np.testing.assert_allclose(deltas, theirs, rtol=2e-2)
    assert np.all(deltas >= theirs * (1 - 2e-3))
    for epsilon, delta in zip(epsilons[1:], deltas[1:], strict=True):
        assert a.upper(delta * (1 + 1e-9), interval=a.interval_for(1e-6)) <= epsilon * (1 + 1e-3)


@pytest.mark.parametrize(
    "k, delta", [pytest.param(2, 1e-8, marks=pytest.mark.slow), pytest.param(4, 1e-5, marks=pytest.mark.slow)]
)
def test_groups_agree_with_dp_accountings_mixture_of_gaussians(k, delta):
    q, sigma, steps = 0.02, 1.2, 100
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, list(range(k + 1)), stats.binom.pmf(range(k + 1), k, q), value_discretization_interval=1e-4
    )
    theirs = step.self_compose(steps).get_epsilon_for_delta(delta)
    ours = Accountant(mechanism(q, sigma, steps), group_size=k).epsilon(delta)
    assert ours.lower * (1 - 1e-3) <= theirs <= ours.upper * (1 + 1e-3)
    assert ours.upper <= ours.lower * 1.01
    single = Accountant(mechanism(q, sigma, steps)).epsilon(delta)
    assert single.upper < ours.lower


def test_group_of_a_full_batch_is_a_gaussian_of_k_times_the_shift():
    ours = Accountant(mechanism(1.0, 10.0, 4), group_size=3).epsilon(1e-6)
    same = Accountant(mechanism(1.0, 10.0 / 3, 4)).epsilon(1e-6)
    assert ours.upper == pytest.approx(same.upper, rel=2e-3)


def test_pitfall_28_a_capped_group_pays_for_what_truncation_may_reveal():
    plain = mechanism(0.05, 2.0, 50, units=10_000, relation=ZERO_OUT)

    def capped(cap):
        return Accountant(plain.replace(max_batch_size=cap), group_size=3).quick_upper(1e-5)

    free = Accountant(plain, group_size=3).quick_upper(1e-5)
    assert free <= capped(700) <= free * 1.001 < capped(610)
    assert capped(560) == math.inf


def test_displacement_bound_covers_a_brute_force_of_the_truncated_sampler():
    """Three units, at most two in a batch, one emptied: the exact distributions over batches, one step, on a
    fine grid."""
    n, q, sigma, cap = 3, 0.3, 1.0, 2
    x = np.linspace(-12, 14, 40_001)

    def density(mean):
        return stats.norm.pdf(x, mean, sigma)

    probabilities = {0: 0.0, 1: 0.0}  # of the first unit's absence and presence in the batch that is kept
    for drawn in itertools.product((0, 1), repeat=n):
        p = math.prod(q if d else 1 - q for d in drawn)
        share = min(1.0, cap / max(sum(drawn), 1)) if drawn[0] else 0.0
        probabilities[1] += p * share
        probabilities[0] += p * (1 - share)
    # The others' gradients are zero here, so the kept batch only shifts the sum by the first unit's.
    with_unit = probabilities[0] * density(0.0) + probabilities[1] * density(1.0)
    without = density(0.0)
    m = dp_sgd(n, n * q, cap, sigma, 1.0, 1, ZERO_OUT)
    for epsilon in (0.1, 0.3, 1.0):
        exact = max(
            np.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x)
            for a, b in ((with_unit, without), (without, with_unit))
        )
        assert exact <= Accountant(m).deltas([epsilon], 1e-3)[0] <= 1


def test_displacement_is_the_probability_that_the_others_fill_the_batch():
    """Written out, because no brute force of small batches is tight."""
    m = dp_sgd(40, 10, 14, 1.0, 1.0, 2, ZERO_OUT)
    for group in (1, 3):
        tail = math.fsum(
            math.comb(40 - group, j) * 0.25**j * 0.75 ** (40 - group - j) for j in range(14 - group + 1, 41 - group)
        )
        assert 0.01 < 2 * tail < 0.9
        assert truncation.displacement_delta(m, 2, group) == pytest.approx(2 * tail, rel=1e-12)
    full, pair = truncation.displacement(m)
    assert full == pytest.approx(math.fsum(math.comb(39, j) * 0.25**j * 0.75 ** (39 - j) for j in range(14, 40)))
    # Given that the others fill it, a unit that is drawn is kept with a probability of cap / (number drawn).
    kept = math.fsum(0.25 * math.comb(39, j) * 0.25**j * 0.75 ** (39 - j) * 14 / (j + 1) for j in range(14, 40)) / full
    assert pair.sigma == 0.5 and [w for _, w in (*pair.upper, *pair.lower)] == pytest.approx([kept, kept], rel=1e-9)


def test_every_capped_part_of_a_composition_pays_for_its_truncation():
    """The same plan twice costs what one of twice the steps costs, in epsilon and in the profile of deltas."""
    plan = mechanism(0.05, 1.0, 100, units=10_000, cap=600, relation=ADD_OR_REMOVE)
    other = plan.replace(noise_multiplier=1.0001)
    whole = Accountant(plan.replace(steps=200))
    assert Accountant([plan, plan]).epsilon(1e-5).upper == whole.epsilon(1e-5).upper
    parts = [Accountant([plan, other]), Accountant([other, plan])]
    overflow = stats.binom.sf(600, 10_000, 0.05)
    for found in (whole, *parts):
        plain = Accountant([m.replace(max_batch_size=None) for m in found.mechanisms])
        for epsilon in (0.5, 1.0, 2.0):
            (with_cap,), (without,) = (a.deltas([epsilon], 1e-5) for a in (found, plain))
            extra = (1 + math.exp(epsilon)) * 200 * overflow
            assert with_cap == pytest.approx(without + extra, rel=1e-3)
        assert found.epsilon(1e-5).upper == pytest.approx(whole.epsilon(1e-5).upper, rel=1e-3)


def test_no_noise_means_no_guarantee_and_no_steps_cost_nothing():
    assert Accountant(mechanism(sigma=0.0)).epsilon(1e-5).upper == math.inf
    assert Accountant(mechanism()).epsilon(1e-5, steps=0).upper == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_the_unit_interval_is_refused(delta):
    with pytest.raises(InputError, match="delta"):
        Accountant(mechanism()).epsilon(delta)


def test_pitfall_28_truncation_is_charged_by_the_additive_bound_under_add_or_remove():
    # pitfall 28: dp-accounting returns the zero-out number for a truncated event under add/remove; here the bound is
    # valid for both.
    plain, delta = mechanism(0.05, 1.0, 200, units=10_000), 1e-5
    epsilon = Accountant(plain).epsilon(delta).upper
    cap = truncation.plan_max_batch_size(10_000, 500, 200, epsilon, delta, share=0.3)
    bracket = Accountant(plain.replace(max_batch_size=cap)).epsilon(delta)
    overflow = stats.binom.sf(cap, 10_000, 0.05)
    expected = Accountant(plain).upper(delta - (1 + math.exp(bracket.upper)) * 200 * overflow, interval=1e-4)
    assert bracket.upper == pytest.approx(expected, rel=1e-3)
    assert bracket.upper > epsilon


@pytest.mark.parametrize("cap", [540, pytest.param(570, marks=pytest.mark.slow), 620])
def test_truncated_sampler_agrees_with_dp_accounting(cap):
    m = mechanism(0.05, 1.0, 100, units=10_000, cap=cap, relation=ZERO_OUT)
    step = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=10_000,
        sampling_probability=0.05,
        truncated_batch_size=cap,
        noise_multiplier=1.0,
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    )
    theirs = step.self_compose(100).get_epsilon_for_delta(1e-6)
    assert Accountant(m).upper(1e-6, interval=1e-4) <= theirs * 1.001


def test_planned_cap_costs_at_most_its_share():
    cap = truncation.plan_max_batch_size(10_000, 500, 200, 8.0, 1e-5, share=1e-3, multiple=4)
    assert cap % 4 == 0
    assert (1 + math.exp(8)) * 200 * stats.binom.sf(cap, 10_000, 0.05) <= 1e-8
    assert (1 + math.exp(8)) * 200 * stats.binom.sf(cap - 8, 10_000, 0.05) > 1e-8


def test_the_smallest_cap_is_planned_however_little_it_may_cost():
    mpmath = pytest.importorskip("mpmath")
    units, batch, steps, epsilon, delta = 1_000_000, 1000, 500, 8.0, 1e-8
    cap = truncation.plan_max_batch_size(units, batch, steps, epsilon, delta)
    with mpmath.workdps(40):
        q = mpmath.mpf(batch / units)

        def tail(above):
            k = above + 1
            term, total = mpmath.binomial(units, k) * q**k * (1 - q) ** (units - k), mpmath.mpf(0)
            for k in range(above + 1, above + 400):
                total, term = total + term, term * (units - k) / (k + 1) * q / (1 - q)
            return total

        def cost(above):
            return (1 + mpmath.exp(epsilon)) * steps * tail(above)

        assert cost(cap) <= 1e-3 * delta < cost(cap - 1)
        assert truncation.overflow_probability(units, batch / units, cap) == pytest.approx(float(tail(cap)), rel=1e-6)
    # Without a target, too.
    assert truncation.plan_max_batch_size(300, 12, 6, math.inf, 1e-4) < 60


def test_calibration_ends_on_the_private_side():
    plan = mechanism(512 / 8000, 1.0, 160, units=8000)
    solved = calibration.noise_multiplier(plan, 8.0, 1e-5)
    assert Accountant(solved).epsilon(1e-5).upper <= 8.0
    less = solved.replace(noise_multiplier=solved.noise_multiplier * 0.999)
    assert Accountant(less).epsilon(1e-5).upper > 8.0

    steps = calibration.steps(solved, 8.0, 1e-5, largest=1000).steps
    assert Accountant(solved).epsilon(1e-5, steps).upper <= 8.0 < Accountant(solved).epsilon(1e-5, steps + 1).upper

    batch = calibration.expected_batch_size(solved, 8.0, 1e-5)
    assert batch.expected_batch_size == pytest.approx(512, abs=2)
    assert Accountant(batch).epsilon(1e-5).upper <= 8.0

    units = calibration.num_units(solved, 8.0, 1e-5)
    assert units.num_units == pytest.approx(8000, rel=1e-3)
    assert Accountant(units).epsilon(1e-5).upper <= 8.0


@pytest.mark.slow
def test_calibration_of_vaultgemmas_noise():
    solved = calibration.noise_multiplier(VAULTGEMMA, 2.0, 1.1e-10)
    assert solved.noise_multiplier == pytest.approx(0.5985, abs=2e-4)


def test_unreachable_epsilon_is_refused():
    # The cap overflows so often that truncation alone exceeds delta, whatever the noise.
    with pytest.raises(InputError, match="no noise reaches"):
        calibration.noise_multiplier(mechanism(0.05, 1.0, 100, units=10_000, cap=480), 1.0, 1e-6)


def test_live_curve_never_shows_less_than_the_bound():
    a = Accountant(mechanism(0.05, 1.0, 97, units=10_000))
    curve = EpsilonCurve(a, 1e-5)
    shown = [curve.at(t) for t in range(98)]
    assert shown == sorted(shown)
    for t in (1, 7, 50, 96, 97):
        assert shown[t] >= a.epsilon(1e-5, t).upper * (1 - 1e-9)
    with pytest.raises(ValueError):
        curve.at(98)


def test_epsilon_of_a_whole_run_is_the_accountants():
    assert accountant.epsilon(mechanism(), 1e-5) == Accountant(mechanism()).epsilon(1e-5)
    assert np.isfinite(accountant.epsilon(mechanism(), 1e-5).upper)
