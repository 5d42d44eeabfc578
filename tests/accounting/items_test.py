"""Epsilon of units whose items are drawn one by one, against dp-accounting and by brute force."""

import itertools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from jax_privacy.accounting import accountants, analysis
from scipy import stats

from accounting.accountant import LARGEST_GROUP, Accountant
from accounting.errors import InputError
from accounting.loss_distribution import truncation
from accounting.mechanism import ADD_OR_REMOVE, FIXED, ZERO_OUT, dp_sgd


def users(k, q, noise, steps, units=1000, **changes):
    """Units of k items, each drawn with probability q."""
    return dp_sgd(units, units * k * q, None, noise, 1.0, steps, items_per_unit=k, **changes)


@pytest.mark.parametrize(
    "k, q, noise, steps, delta",
    [
        pytest.param(2, 0.02, 1.2, 50, 1e-6, marks=pytest.mark.slow),
        (5, 0.01, 3.0, 20, 1e-5),
        pytest.param(8, 0.005, 4.0, 500, 1e-5, marks=pytest.mark.slow),
        pytest.param(32, 0.01, 8.0, 100, 1e-6, marks=pytest.mark.slow),
        pytest.param(LARGEST_GROUP, 0.02, 20.0, 10, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_agreement_with_dp_accountings_mixture_of_gaussians(k, q, noise, steps, delta):
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, list(range(k + 1)), stats.binom.pmf(range(k + 1), k, q), value_discretization_interval=1e-4
    )
    theirs = step.self_compose(steps).get_epsilon_for_delta(delta)
    ours = Accountant(users(k, q, noise, steps)).epsilon(delta)
    assert ours.lower * (1 - 1e-3) <= theirs <= ours.upper * (1 + 1e-3)
    assert ours.upper == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_agreement_with_jax_privacy(k):
    """Rows of users drawn one by one, and users drawn as a whole, as jax-privacy accounts for them."""
    config = accountants.PldAccountantConfig(value_discretization_interval=1e-4)
    facts = dict(noise_multipliers=2.5, num_samples=4000, delta=1e-5, batch_size=80)
    if k == 1:
        theirs = analysis.DpsgdTrainingAccountant(config).compute_epsilon(40, analysis.DpParams(**facts))
    else:
        params = analysis.DpParams(**facts, examples_per_user=k)
        theirs = analysis.DpsgdTrainingUserLevelAccountant(config).compute_epsilon(40, params)
    ours = Accountant(users(k, 0.02, 2.5, 40, units=4000 // k)).epsilon(1e-5)
    assert ours.upper == pytest.approx(theirs, rel=1e-3)


def test_the_number_of_units_enters_by_the_probability_alone():
    """Empty items are drawn too, so q is that of one item."""
    plan = users(4, 0.01, 2.0, 30)
    assert plan.num_items == 4000 and plan.sampling_probability == 0.01 and plan.expected_batch_size == 40
    one, many = (Accountant(users(4, 0.01, 2.0, 30, units=n)).upper(1e-5) for n in (1000, 50_000))
    assert one == pytest.approx(many, rel=1e-9)
    single = Accountant(dp_sgd(1000, 10, None, 2.0, 1.0, 30)).upper(1e-5)
    assert one > 2 * single


def test_owners_of_several_units_own_all_of_their_items():
    two_of_three = Accountant(users(3, 0.01, 4.0, 20), group_size=2).upper(1e-5)
    six_of_one = Accountant(users(1, 0.01, 4.0, 20), group_size=6).upper(1e-5)
    one_of_six = Accountant(users(6, 0.01, 4.0, 20)).upper(1e-5)
    assert two_of_three == pytest.approx(six_of_one, rel=1e-9) and two_of_three == pytest.approx(one_of_six, rel=1e-9)


@pytest.mark.parametrize("k, q, noise", [(2, 0.3, 1.0), (3, 0.6, 1.5)])
@pytest.mark.parametrize("replaced", [False, True])
def test_no_items_in_the_plane_are_told_apart_more_easily(k, q, noise, replaced):
    """Any k contributions of norm at most 1, against none or against any k others, in either direction."""
    rng = np.random.default_rng(11)
    line = np.linspace(-12, 12, 481)
    x, y = np.meshgrid(line, line)
    cell = (line[1] - line[0]) ** 2
    epsilons = np.array([0.05, 0.3, 1.0, 2.0])
    bounds = Accountant(users(k, q, noise, 1), replaced=replaced).deltas(epsilons, 1e-6)

    def density(items):
        total = np.zeros_like(x)
        for drawn in itertools.product((0, 1), repeat=k):
            a, b = np.array(drawn) @ items
            weight = q ** sum(drawn) * (1 - q) ** (k - sum(drawn))
            total += weight * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * noise**2)) / (2 * math.pi * noise**2)
        return total

    for trial in range(10):
        angles = rng.uniform(0, 2 * math.pi, (2, k)) if trial else np.array([[0.0] * k, [math.pi] * k])
        radii = rng.uniform(0, 1, (2, k)) ** 0.2 if trial else np.ones((2, k))
        items, others = (np.stack([r * np.cos(t), r * np.sin(t)], axis=1) for r, t in zip(radii, angles, strict=True))
        one, two = density(items), density(others if replaced else np.zeros((k, 2)))
        told = np.array(
            [
                [float(np.maximum(p - math.exp(e) * r, 0).sum() * cell) for e in epsilons]
                for p, r in ((one, two), (two, one))
            ]
        )
        assert (told <= bounds * (1 + 1e-3) + 1e-9).all()
        if not trial:  # all in one direction, and all in the opposite one, are the worst
            np.testing.assert_allclose(told.max(axis=0), bounds, rtol=0.02)


@pytest.mark.parametrize("relation", [ZERO_OUT, ADD_OR_REMOVE])
def test_a_cap_is_paid_for_by_all_items_of_a_unit(relation):
    plan = users(4, 0.05, 6.0, 50, units=2500, neighbouring_relation=relation)
    free = Accountant(plan).quick_upper(1e-5)
    assert free <= Accountant(plan.replace(max_batch_size=720)).quick_upper(1e-5) <= free * 1.01
    assert Accountant(plan.replace(max_batch_size=510)).quick_upper(1e-5) == math.inf
    capped = plan.replace(max_batch_size=580)
    tail = 50 * stats.binom.sf(580 - 4, 10_000 - 4, 0.05)
    assert truncation.displacement_delta(capped, 50) == pytest.approx(tail, rel=1e-12)
    assert truncation.additive_delta(capped, 0.0, 50) == pytest.approx(100 * stats.binom.sf(580, 10_000, 0.05))


def test_what_a_cap_may_reveal_is_added_to_delta_for_all_items():
    """At a large epsilon by displacement: while the others leave room for all k items, nothing is cut."""
    plan = users(4, 0.05, 6.0, 50, units=2500, neighbouring_relation=ZERO_OUT)
    free, capped = (Accountant(m).deltas([3.0], 1e-5)[0] for m in (plan, plan.replace(max_batch_size=580)))
    one, four = (50 * stats.binom.sf(580 - k, 10_000 - k, 0.05) for k in (1, 4))
    assert capped - free == pytest.approx(four, rel=1e-6) and four > 1.4 * one


@pytest.mark.parametrize("cap", [9, 12])
def test_a_brute_force_of_the_capped_sampler_is_covered(cap):
    """Two of twenty items are one unit's; the others pull the other way, so that being displaced by it shows."""
    k, others, q, noise = 2, 18, 0.25, 1.0
    x = np.linspace(-40, 25, 26_001)

    def density(content):
        total = np.zeros_like(x)
        for own, rest in itertools.product(range(k + 1), range(others + 1)):
            kept = min(own + rest, cap)
            drawn = stats.binom.pmf(own, k, q) * stats.binom.pmf(rest, others, q)
            for mine in range(max(0, kept - rest), min(own, kept) + 1):
                ways = math.comb(own, mine) * math.comb(rest, kept - mine) / math.comb(own + rest, kept)
                weight = drawn * ways
                total += weight * stats.norm.pdf(x, content * mine - (kept - mine), noise)
        return total

    plan = dp_sgd(10, 20 * q, cap, noise, 1.0, 1, ZERO_OUT, items_per_unit=k)
    epsilons = np.array([0.2, 1.0, 2.0])
    bounds = Accountant(plan).deltas(epsilons, 1e-6)
    full, empty = density(1.0), density(0.0)
    for one, two in ((full, empty), (empty, full)):
        told = [float(np.maximum(one - math.exp(e) * two, 0).sum() * (x[1] - x[0])) for e in epsilons]
        assert (told <= bounds * (1 + 1e-6)).all() and max(told) > 1e-3


def test_what_has_no_proof_is_refused():
    with pytest.raises(InputError, match="several items"):
        Accountant(dp_sgd(100, 10, None, 1.0, 1.0, 5, ZERO_OUT, FIXED, items_per_unit=2))
    with pytest.raises(InputError, match="unit of one item"):
        Accountant(users(2, 0.1, 1.0, 1), bounds=("renyi",))
    with pytest.raises(InputError, match=f"more than the {LARGEST_GROUP}"):
        Accountant(users(LARGEST_GROUP + 1, 0.01, 1.0, 1))
    with pytest.raises(InputError, match="at least 1"):
        users(0, 0.1, 1.0, 1)


def test_facts_say_how_many_items_a_unit_has():
    plan = users(7, 0.01, 1.0, 3)
    assert dp_sgd(**plan.facts()) == plan and plan.facts()["items_per_unit"] == 7
    old = {name: value for name, value in users(1, 0.01, 1.0, 3).facts().items() if name != "items_per_unit"}
    assert dp_sgd(**old).items_per_unit == 1


def test_items_that_units_share_are_drawn_from_their_own_number():
    shared = dp_sgd(500, 60, None, 3.0, 1.0, 20, ZERO_OUT, items_per_unit=4, shared_items=1200)
    own = dp_sgd(300, 60, None, 3.0, 1.0, 20, ZERO_OUT, items_per_unit=4)
    assert shared.num_items == own.num_items == 1200 and shared.sampling_probability == 0.05
    assert Accountant(shared).upper(1e-5) == pytest.approx(Accountant(own).upper(1e-5), rel=1e-12)
    assert dp_sgd(**shared.facts()) == shared
    capped = shared.replace(max_batch_size=90)
    tail = 20 * stats.binom.sf(90 - 4, 1200 - 4, 0.05)
    assert truncation.displacement_delta(capped, 20) == pytest.approx(tail, rel=1e-12)
    for facts in (dict(neighbouring_relation=ADD_OR_REMOVE), dict(sampler=FIXED)):
        with pytest.raises(InputError, match=r"shares|several items"):
            Accountant(shared.replace(**facts))
    with pytest.raises(InputError, match="cannot share"):
        shared.replace(shared_items=2001)
