"""The accountant at the ends of what it takes: enormous numbers of releases, enormous or tiny noise, tiny deltas.

The truth comes from closed forms in mpmath's arithmetic, and from a contour integral of the moment generating function.
"""

import math

import mpmath
import numpy as np
import pytest
from scipy import optimize

from accounting import calibration
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import dp_sgd

UNITS = 10**15


def bracket(noise, probability, steps, delta, **group):
    return Accountant(dp_sgd(UNITS, probability * UNITS, None, noise, 1.0, steps), **group).epsilon(delta)


def gaussian_epsilon(mu, delta):
    """Of a Gaussian mechanism: Balle and Wang 2018, theorem 8."""
    with mpmath.workdps(60):
        mu = mpmath.mpf(mu)

        def excess(epsilon):
            left, right = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
            return mpmath.log(mpmath.ncdf(left) - mpmath.exp(epsilon) * mpmath.ncdf(right)) - mpmath.log(delta)

        low, high = mpmath.mpf(0), mpmath.mpf(1000)
        for _ in range(120):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return float(low)


def one_release_epsilon(noise, probability, delta, group=1):
    """The loss grows with x in one direction and falls in the other: the best event is a half-line."""
    with mpmath.workdps(60):
        sigma, q, k = mpmath.mpf(noise), mpmath.mpf(probability), group
        weights = [mpmath.binomial(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]

        def told(x, remove):
            """(epsilon, delta) where the event begins at x."""
            ratio = mpmath.fsum(w * mpmath.exp((2 * j * x - j**2) / (2 * sigma**2)) for j, w in enumerate(weights))
            if remove:
                p = mpmath.fsum(w * mpmath.ncdf(-(x - j) / sigma) for j, w in enumerate(weights))
                return mpmath.log(ratio), p - ratio * mpmath.ncdf(-x / sigma)
            other = mpmath.fsum(w * mpmath.ncdf((x - j) / sigma) for j, w in enumerate(weights))
            return -mpmath.log(ratio), mpmath.ncdf(x / sigma) - other / ratio

        found = []
        for remove in (True, False):
            low, high = mpmath.mpf(-60), mpmath.mpf(60 + k)
            for _ in range(200):
                middle = (low + high) / 2
                too_large = told(middle, remove)[1] > delta
                low, high = (middle, high) if too_large == remove else (low, middle)
            found.append(told(low, remove)[0])
        return float(max(found))


def composed_epsilon(noise, probability, steps, delta):
    """Removal of one unit: delta = 1 / (2 pi i) times the integral of M(z)^T e^(-z epsilon) / (z (z + 1)) along a line
    of constant real part, where M(z) = E_Q[ratio^(z + 1)], by Gauss and Hermite.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    log_ratio = np.log1p(probability * np.expm1((2 * noise * nodes - 1) / (2 * noise**2)))
    mu = probability * math.sqrt(steps * math.expm1(noise**-2))
    guess = gaussian_epsilon(mu, delta)
    theta = max(guess / mu**2 - 0.5, 1e-3) + 1 / mu
    t = np.arange(0, 14 / mu, 0.002 / mu) + 0.001 / mu  # of the middles of short pieces
    z = theta + 1j * t
    cumulant = np.array([steps * np.log1p(weights @ np.expm1((one + 1) * log_ratio)) for one in z])

    def log_delta(epsilon):
        integral = np.exp(cumulant - z * epsilon) / (z * (z + 1))
        return math.log(integral.real.sum() * (t[1] - t[0]) / math.pi)

    return optimize.brentq(lambda e: log_delta(e) - math.log(delta), 0.5 * guess, 1.5 * guess, rtol=1e-12)


# sigma, q, T, delta
WITHOUT_SAMPLING = [
    (0.2, 1, 1, 1e-30), (1e6, 1, 10**12, 1e-6), (1e5, 1, 10**10, 1e-10), (1.0, 1, 1, 1e-5), (50.0, 1, 10**4, 1e-8),
]  # fmt: skip


@pytest.mark.parametrize("noise, probability, steps, delta", WITHOUT_SAMPLING)
def test_without_sampling(noise, probability, steps, delta):
    exact = gaussian_epsilon(math.sqrt(steps) / noise, delta)
    found = bracket(noise, probability, steps, delta)
    assert found.lower <= exact * (1 + 1e-12) and exact <= found.upper * (1 + 1e-12)
    assert found.upper <= 1.001 * found.lower and found.cross_check >= exact * (1 - 1e-9)


# sigma, q, delta, k
ONE_RELEASE = [
    (0.5, 0.999, 1e-5, 7), (0.2, 1e-3, 1e-6, 3), (0.2, 0.5, 1e-10, 1), (1.0, 0.3, 1e-12, 1), (3.0, 0.01, 1e-6, 2),
]  # fmt: skip


@pytest.mark.parametrize("noise, probability, delta, group", ONE_RELEASE)
def test_one_release(noise, probability, delta, group):
    exact = one_release_epsilon(noise, probability, delta, group)
    found = bracket(noise, probability, 1, delta, group_size=group)
    assert found.lower <= exact <= found.upper <= 1.005 * found.lower


@pytest.mark.slow
def test_the_smallest_probability():
    """Epsilon lies far below every grid that also reaches the losses of a drawn unit, so its ends are wide here."""
    exact = one_release_epsilon(0.2, 1e-12, 1e-13)
    found = bracket(0.2, 1e-12, 1, 1e-13)
    assert found.lower <= exact <= found.upper <= 1.03 * exact


# sigma, q, T, delta, and the largest excess of the upper end
MANY_RELEASES = [
    (1e3, 1e-3, 10**10, 1e-6, 0.005), (30.0, 1e-4, 10**9, 1e-8, 0.005), (2.0, 1e-4, 10**8, 1e-8, 0.005),
    (1e6, 1e-3, 10**12, 1e-9, 0.05), (3e5, 1e-4, 10**10, 1e-12, 0.05), (3e6, 1e-2, 10**8, 1e-9, 0.05),
]  # fmt: skip


@pytest.mark.parametrize("noise, probability, steps, delta, excess", MANY_RELEASES)
def test_many_releases(noise, probability, steps, delta, excess):
    exact = composed_epsilon(noise, probability, steps, delta)
    found = bracket(noise, probability, steps, delta)
    assert found.lower <= exact <= found.upper <= (1 + excess) * exact
    if exact > 0.01:
        assert found.upper <= 1.005 * found.lower
    assert found.cross_check >= exact


def test_so_little_noise_that_no_single_release_could_have_it():
    """A million releases at sigma 0.5 are one at sigma 0.0005, which is no mechanism that could be trained with.

    The loss is normal with mean mu^2 / 2 and deviation mu = 2000, and beyond epsilon with a probability of 1e-6.
    """
    exact = 2000**2 / 2 + 4.753 * 2000
    found = bracket(0.5, 1, 10**6, 1e-6)
    assert found.lower <= exact <= found.upper <= 1.001 * exact


def test_the_contour_integral_knows_closed_forms():
    assert composed_epsilon(5.0, 1, 100, 1e-6) == pytest.approx(gaussian_epsilon(2.0, 1e-6), rel=1e-9)
    assert one_release_epsilon(1.0, 1, 1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-12)


@pytest.mark.slow
def test_renyi_is_never_reported_where_its_sums_round_to_nothing():
    """dp-accounting says epsilon 0 there, which is no bound."""
    assert bracket(1e6, 1e-3, 10**12, 1e-9).cross_check == math.inf
    assert bracket(1e6, 1e-3, 10**12, 1e-9).upper > 4.3e-3


@pytest.mark.parametrize("delta", [0.5, 0.9999999])
def test_a_budget_that_almost_no_noise_exceeds_is_refused(delta):
    """A unit is drawn with a probability below delta, so any noise would do, and none would protect."""
    with pytest.raises(InputError, match="almost no noise reaches epsilon 8"):
        calibration.noise_multiplier(dp_sgd(357, 16, None, 1.0, 1.0, 1), 8.0, delta)
