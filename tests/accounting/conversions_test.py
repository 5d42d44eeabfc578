"""What epsilon means, against closed forms of the Gaussian mechanism and attacks that are really carried out."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from accounting import conversions
from accounting.accountant import Accountant
from accounting.mechanism import dp_sgd
from accounting.report import tables


def gaussian(mu, steps=25):
    """A mechanism that is one Gaussian of the given mu."""
    return Accountant(dp_sgd(1000, 1000, None, math.sqrt(steps) / mu, 1.0, steps))


def profile_of(accountant, delta=1e-6):
    return conversions.profile(accountant, delta, accountant.epsilon(delta).upper)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_gaussian_closed_forms(mu):
    p = profile_of(gaussian(mu))
    alpha = np.array([1e-3, 1e-2, 0.1, 0.5, 0.9])
    exact = stats.norm.cdf(stats.norm.isf(alpha) - mu)  # Dong, Roth and Su 2022, equation 6
    ours = p.tradeoff(alpha)
    assert np.all(ours <= exact + 1e-9)
    np.testing.assert_allclose(ours, exact, atol=2e-3)
    assert p.membership_advantage == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, rel=1e-3)
    assert mu <= p.gaussian_mu(1e-6) <= mu * 1.01
    assert p.true_positive_rate(0.01) == pytest.approx(1 - exact[1], abs=2e-3)


def test_gaussian_delta_is_the_integral():
    mu, epsilon = 1.3, 0.7

    def excess(x):
        return max(stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x), 0.0)

    assert float(conversions.gaussian_delta(epsilon, mu)) == pytest.approx(
        integrate.quad(excess, -10, 15, limit=200)[0], rel=1e-6
    )


def test_no_likelihood_ratio_attack_beats_the_tradeoff_curve():
    """The best attack on a simulated run, thresholds on the exact log-likelihood ratio; false alarms below 1e-6
    (Hoeffding).
    """
    q, sigma, steps, trials = 0.1, 1.0, 20, 200_000
    p = profile_of(Accountant(dp_sgd(1000, 100, None, sigma, 1.0, steps)), 1e-5)
    rng = np.random.default_rng(0)
    shift = rng.random((trials, steps)) < q
    noise = rng.normal(size=(2, trials, steps)) * sigma

    def ratio(x):
        return np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2))).sum(axis=1)

    absent, present = ratio(noise[0]), ratio(noise[1] + shift)
    slack = math.sqrt(math.log(2e7) / (2 * trials))
    for threshold in np.quantile(absent, [0.5, 0.9, 0.99]):
        false_positive, false_negative = np.mean(absent > threshold), np.mean(present <= threshold)
        bound = float(p.tradeoff([min(false_positive + slack, 1.0)])[0])
        assert false_negative >= bound - slack
    # And the bound is no empty one: the attack comes close to it.
    threshold = np.quantile(absent, 0.9)
    assert np.mean(present <= threshold) <= float(p.tradeoff([0.1])[0]) + 0.02


def test_curve_is_a_convex_tradeoff_curve_between_the_corners():
    alpha = np.linspace(0, 1, 201)
    curve = profile_of(Accountant(dp_sgd(1000, 50, None, 0.8, 1.0, 50))).tradeoff(alpha)
    assert (
        curve[-1] == 0
        and 0.999 < curve[0] <= 1
        and np.all(np.diff(curve) <= 1e-12)
        and np.all(np.diff(curve, 2) >= -1e-9)
    )
    assert np.all(curve <= 1 - alpha + 1e-12)


def test_tables_without_a_guarantee_promise_nothing():
    result = tables.meaning(Accountant(dp_sgd(1000, 50, None, 0.0, 1.0, 50)), 1e-5)
    assert all(epsilon == math.inf for _, epsilon in result.groups) and all(
        detected == 1 for _, detected in result.attacks
    )
    assert result.membership_advantage == 1.0 and result.gaussian_mu == math.inf


def test_tables_of_a_plan():
    accountant = Accountant(dp_sgd(12_920, 256, 384, 0.5224, 1.0, 80, "zero_out"))
    result = tables.meaning(accountant, 1e-5)
    assert [k for k, _ in result.groups] == [1, 2, 3, 7]
    epsilons = [epsilon for _, epsilon in result.groups]
    assert (
        epsilons == sorted(epsilons) and epsilons[0] == accountant.epsilon(1e-5).upper and math.isfinite(epsilons[-1])
    )
    for k, epsilon in result.groups[1:]:  # of owners of exactly so many units, by the accountant at its finest
        exact = Accountant(accountant.mechanisms, group_size=k).epsilon(1e-5)
        assert exact.lower <= epsilon <= 1.02 * exact.upper
    assert dict(result.deltas)[epsilons[0]] <= 1.001e-5
    text = tables.text(result)
    assert "units of one owner" in text and "true-positive rate" in text and "Gaussian mu" in text
