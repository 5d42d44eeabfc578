"""Lower bounds of epsilon: above the truth in few runs, as sharp as is claimed, and equal to those of others."""

import functools

import numpy as np
import pytest
from jax_privacy import auditing
from scipy import optimize, stats

from accounting.empirical import families, gaussian, one_run, protocol, thresholds
from accounting.mechanism import dp_sgd

DELTA, SIGNIFICANCE = 1e-5, 0.05
GAUSSIANS = families.Gaussians(DELTA)
# One of so many simulated runs may exceed the truth more often than the significance by chance with 1e-3.
FALSE_ALARM = 1e-3


@functools.cache
def mu_of(epsilon):
    return optimize.brentq(lambda mu: families.gaussian_epsilon(mu, DELTA) - epsilon, 1e-3, 20)


def simulated(epsilon, canaries, seed):
    """Scores of a Gaussian mechanism's canaries, a coordinate each, and their coins."""
    rng = np.random.default_rng([seed, canaries])
    coins = rng.random(canaries) < 0.5
    return rng.normal(size=canaries) + mu_of(epsilon) * coins, coins


def guess_counts(scores, coins):
    ways = [2 * int(share * len(scores) / 2) for share in protocol.GUESSED]
    return [(g, one_run.correct_guesses(scores, coins, g)) for g in ways]


def of_one_run(scores, coins):
    each, m = SIGNIFICANCE / len(protocol.GUESSED), len(scores)
    return max(one_run.with_epsilon_delta(m, g, c, DELTA, each) for g, c in guess_counts(scores, coins))


def of_leak(leak):
    return 0.0 if leak is None else GAUSSIANS.epsilon(leak)


def ruled_out_by_guesses(family, canaries, guesses, correct, significance):
    def is_ruled_out(leak):
        return one_run.contradicts(family.tradeoff(leak), canaries, guesses, correct, significance)

    return families.largest_ruled_out(family, is_ruled_out)


def of_one_run_curve(scores, coins):
    each, m = SIGNIFICANCE / len(protocol.GUESSED), len(scores)
    return max(of_leak(ruled_out_by_guesses(GAUSSIANS, m, g, c, each)) for g, c in guess_counts(scores, coins))


def of_thresholds(scores, coins):
    return thresholds.with_epsilon_delta(thresholds.rates(scores, coins, SIGNIFICANCE), DELTA)


def of_thresholds_curve(scores, coins):
    known = thresholds.rates(scores, coins, SIGNIFICANCE)
    return of_leak(
        families.largest_ruled_out(GAUSSIANS, lambda leak: thresholds.contradict(GAUSSIANS.tradeoff(leak), known))
    )


def of_gaussian(scores, coins):
    return families.gaussian_epsilon(gaussian.mu(scores, coins, SIGNIFICANCE), DELTA)


BOUNDS = [of_one_run, of_one_run_curve, of_thresholds, of_thresholds_curve, of_gaussian]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("epsilon", "runs"),
    [(1.0, 100), (8.0, 100), *(pytest.param(e, 400, marks=pytest.mark.slow) for e in (0.5, 1.0, 2.0, 4.0, 8.0))],
)
def test_no_bound_exceeds_the_truth_too_often(bound, epsilon, runs):
    exceeded = sum(bound(*simulated(epsilon, 1000, seed)) > epsilon for seed in range(runs))
    assert exceeded <= stats.binom.ppf(1 - FALSE_ALARM, runs, SIGNIFICANCE)


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_bound_finds_a_leak_where_there_is_none(bound):
    """Among them runs in which chance lets the held-out canaries score higher."""
    found = []
    for seed in range(100):
        rng = np.random.default_rng([seed, 1])
        found.append(bound(rng.normal(size=500), rng.random(500) < 0.5))
    assert np.count_nonzero(found) <= stats.binom.ppf(1 - FALSE_ALARM, 100, SIGNIFICANCE)


@pytest.mark.parametrize(("epsilon", "least"), [(4.0, 0.8), (8.0, 0.8)])
def test_the_best_bound_comes_near_the_truth(epsilon, least):
    best = [
        max(bound(*simulated(epsilon, 10_000, seed)) for bound in (of_gaussian, of_thresholds_curve)) for seed in (1, 2)
    ]
    assert min(best) >= least * epsilon


def test_a_difference_of_the_wrong_sign_is_no_leak():
    """The absolute value of mu would report one."""
    scores, coins = simulated(4.0, 2000, seed=0)
    assert of_gaussian(scores, coins) > 2 and of_gaussian(-scores, coins) == 0


@pytest.mark.parametrize(("epsilon", "canaries", "guesses"), [(1.0, 1000, 100), (4.0, 1000, 40), (4.0, 3000, 900)])
def test_one_run_agrees_with_jax_privacy(epsilon, canaries, guesses):
    """Which guesses in one direction: the scores above a threshold."""
    scores, coins = simulated(epsilon, canaries, seed=3)
    threshold = np.sort(scores)[::-1][guesses - 1]
    correct = int(coins[scores >= threshold].sum())
    theirs = auditing.CanaryScoreAuditor(scores[coins], scores[~coins])
    explicit = {"threshold_strategy": auditing.Explicit(threshold)}
    wanted = theirs.epsilon_one_run(SIGNIFICANCE, DELTA, **explicit)
    assert one_run.with_epsilon_delta(canaries, guesses, correct, DELTA, SIGNIFICANCE) == pytest.approx(
        wanted, abs=2e-3
    )
    wanted = theirs.epsilon_one_run_fdp(SIGNIFICANCE, DELTA, **explicit)
    mine = ruled_out_by_guesses(
        families.Gaussians(DELTA, np.geomspace(1e-2, 5, 4000)), canaries, guesses, correct, SIGNIFICANCE
    )
    assert of_leak(mine) == pytest.approx(wanted, rel=0.01, abs=0.02)


@pytest.mark.parametrize(
    ("mu", "canaries", "guesses", "correct"), [(0.5, 20, 12, 10), (1.0, 30, 30, 27), (2.0, 25, 10, 10)]
)
def test_the_recursion_is_the_optimum_of_a_linear_program(mu, canaries, guesses, correct):
    """The most probable a count can be under the inequalities that turning over a coin gives, found without the
    recursion: the curve is replaced by tangents, which can only allow more."""
    curve = GAUSSIANS.tradeoff(mu)
    g, m, c = guesses, canaries, correct
    i = np.arange(g + 1)
    rows, limits = [], []
    for count in range(1, g + 1):
        right = np.where(i >= count, i / m, 0.0)
        wrong = np.where(i >= count - 1, (g - i) / m, 0.0)
        for x in np.linspace(1e-4, 0.9999, 400):  # right <= 1 - f(x) - f'(x) (wrong - x)
            slope = (curve(x + 1e-6) - curve(x - 1e-6)) / 2e-6
            rows.append(right + slope * wrong)
            limits.append(1 - curve(x) + slope * x)
    found = optimize.linprog(-(i >= c).astype(float), A_ub=rows, b_ub=limits, A_eq=[np.ones(g + 1)], b_eq=[1.0])
    most = -found.fun
    assert 1e-6 < most < 0.9
    assert one_run.contradicts(curve, m, g, c, most * 1.02) and not one_run.contradicts(curve, m, g, c, most * 0.98)


# Guesses of coins, and a pair (epsilon, delta), are too blunt to tell a quarter of the noise with so few canaries.
SHARPEST = {protocol.THRESHOLDS_CURVE, protocol.GAUSSIAN}


def steps_without_sampling(sigma):
    return dp_sgd(1000, 1000, None, noise_multiplier=sigma, clip_norm=1.0, steps=4)


def test_a_sound_run_is_not_contradicted_and_a_broken_one_is():
    """Four steps without sampling, a Gaussian of mu = 2 / sigma. In one run of twenty a bound may exceed the truth."""
    registered = protocol.of_gradients(1.0)
    family = families.ScaledNoise(steps_without_sampling(2.0), DELTA)
    proven = family.epsilon(1.0) * 1.001
    above = 0
    for seed in range(40):
        rng = np.random.default_rng([seed, 7])
        coins = rng.random(1000) < 0.5
        noise = rng.normal(size=1000)
        found = protocol.assess(registered, {protocol.LIKELIHOOD_RATIO: noise + coins}, coins, DELTA, proven, family)
        assert not found.contradicts
        above += found.epsilon > proven
        broken = {protocol.LIKELIHOOD_RATIO: noise / 4 + coins}
        if seed < 3:
            found = protocol.assess(registered, broken, coins, DELTA, proven, family)
            assert found.contradicts and found.epsilon >= proven
            assert {bound.bound for bound in found.bounds if bound.contradicts} >= SHARPEST
    assert above <= stats.binom.ppf(1 - FALSE_ALARM, 40, SIGNIFICANCE)


@pytest.mark.parametrize("cap", [220, pytest.param(260, marks=pytest.mark.slow)])
def test_a_cap_that_costs_much_is_left_out_of_the_family_and_not_of_the_proof(cap):
    """With it epsilon would not grow with the leak, and the search would be stuck at the run itself."""
    run = dp_sgd(4000, 200, cap, noise_multiplier=1.0, clip_norm=1.0, steps=10, neighbouring_relation="zero_out")
    family = families.ScaledNoise(run, DELTA)
    epsilons = [family.epsilon(leak) for leak in family.leaks[40:60]]
    assert epsilons == sorted(epsilons) and epsilons[0] < epsilons[-1]
    for rate in (0.001, 0.1):
        assert family.own(rate) <= family.tradeoff(1.0)(rate)
        curves = [family.tradeoff(leak)(rate) for leak in family.leaks[40:60]]
        assert curves == sorted(curves, reverse=True)


def test_noise_that_cannot_be_accounted_for_rules_out_nothing():
    run = dp_sgd(1000, 100, None, noise_multiplier=0.004, clip_norm=1.0, steps=1)
    assert families.ScaledNoise(run, DELTA).tradeoff(4.0)(0.5) == 0


def test_a_run_s_own_curve_is_a_family():
    run = dp_sgd(2000, 200, None, noise_multiplier=0.8, clip_norm=1.0, steps=20)
    family = families.ScaledNoise(run, DELTA)
    epsilons = [family.epsilon(leak) for leak in (0.5, 1.0, 2.0)]
    assert epsilons == sorted(epsilons)
    curves = [family.tradeoff(leak) for leak in (0.5, 1.0, 2.0)]
    for rate in (1e-4, 0.01, 0.3, 0.9):
        values = [curve(rate) for curve in curves]
        assert values == sorted(values, reverse=True)
        # It is its own inverse, as the recursion assumes, but for the part that lies on the axis.
        inverse = curves[1](curves[1](rate))
        assert inverse == pytest.approx(rate, abs=1e-3) or curves[1](rate) == 0


@pytest.mark.parametrize("bounds", [(protocol.ONE_RUN,), (protocol.ONE_RUN, protocol.THRESHOLDS, protocol.GAUSSIAN)])
def test_a_protocol_shares_its_significance(bounds):
    """Two scores and several bounds: each has its part of the significance, and so has each way to guess."""
    scores, coins = simulated(8.0, 1000, seed=5)
    both = {protocol.LOSS: scores, protocol.LOSS_AGAINST_START: -scores}
    registered = protocol.Protocol(tuple(both), bounds)
    found = protocol.assess(registered, both, coins, DELTA, 20.0, None)
    share = SIGNIFICANCE / (2 * len(bounds))
    wanted = {
        protocol.ONE_RUN: max(
            one_run.with_epsilon_delta(1000, g, c, DELTA, share / 4) for g, c in guess_counts(scores, coins)
        ),
        protocol.THRESHOLDS: thresholds.with_epsilon_delta(thresholds.rates(scores, coins, share), DELTA),
        protocol.GAUSSIAN: families.gaussian_epsilon(gaussian.mu(scores, coins, share), DELTA),
    }
    of_first = {bound.bound: bound.epsilon for bound in found.bounds if bound.score == protocol.LOSS}
    assert of_first == {name: wanted[name] for name in bounds}
    assert all(bound.epsilon == 0 for bound in found.bounds if bound.score != protocol.LOSS)
    assert found.epsilon == max(of_first.values()) and not found.contradicts
    # A claim is contradicted at the smaller significance alone.
    if protocol.GAUSSIAN in bounds:
        each = share * protocol.CONTRADICTION / SIGNIFICANCE
        surely = families.gaussian_epsilon(gaussian.mu(scores, coins, each), DELTA)
        assert 0 < surely < of_first[protocol.GAUSSIAN]
        for proven, contradicts in ((0.99 * surely, True), (1.01 * surely, False)):
            found = protocol.assess(registered, both, coins, DELTA, proven, None)
            assert found.bounds[2].contradicts == contradicts and found.bounds[2].bound == protocol.GAUSSIAN


def test_a_protocol_is_what_the_ledger_says_it_is():
    registered = protocol.of_gradients(0.1)
    assert protocol.Protocol.of_facts(registered.facts()) == registered
    assert protocol.Protocol.of_facts(protocol.of_texts().facts()) == protocol.of_texts()
    for changed in (
        {"significance": 0.2}, {"scores": ["other"]}, {"scores": []}, {"bounds": "one_run"}, {"version": 9},
        {"more": 1},
        {"bounds": ["one_run", "one_run"]}, {"guessed": []}, {"contradiction": 0.5},
    ):  # fmt: skip
        with pytest.raises(protocol.InputError):
            protocol.Protocol.of_facts(registered.facts() | changed)
