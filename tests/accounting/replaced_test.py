"""Epsilon for one content of a unit against another, by closed forms and by brute force."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from accounting import conversions
from accounting.accountant import Accountant
from accounting.mechanism import ADD_OR_REMOVE, ZERO_OUT, dp_sgd


def replaced(*facts, **changes):
    return Accountant(dp_sgd(*facts, **changes), replaced=True)


@pytest.mark.parametrize("noise, steps", [(1.0, 1), (5.0, 100), (0.4, 2), (30.0, 40)])
@pytest.mark.parametrize("relation", [ZERO_OUT, ADD_OR_REMOVE])
def test_without_sampling_it_is_the_gaussian_mechanism_of_twice_the_shift(noise, steps, relation):
    mu = 2 * math.sqrt(steps) / noise
    exact = optimize.brentq(lambda e: float(conversions.gaussian_delta(e, mu)) - 1e-5, 0, 500)
    bracket = replaced(1000, 1000, None, noise, 1.0, steps, relation).epsilon(1e-5)
    assert bracket.lower <= exact <= bracket.upper <= exact * 1.002


def test_the_known_cost_of_the_words_with_what_content():
    """sigma 1 without sampling: 4.38 for presence, 10.0 for content."""
    plan = dp_sgd(1000, 1000, None, 1.0, 1.0, 1)
    assert Accountant(plan).epsilon(1e-5).upper == pytest.approx(4.377, abs=2e-3)
    assert Accountant(plan, replaced=True).epsilon(1e-5).upper == pytest.approx(9.997, abs=2e-3)


@pytest.mark.parametrize("q, noise", [(0.1, 1.0), (0.5, 0.7), (0.01, 2.0), (0.9, 0.5)])
def test_one_release_agrees_with_its_closed_form(q, noise):
    """The likelihood ratio grows, so the best event is a half-line, whose masses scipy knows."""

    def density(x, sign):
        return (1 - q) * stats.norm.pdf(x, 0, noise) + q * stats.norm.pdf(x, sign, noise)

    def mass_beyond(x, sign):
        return (1 - q) * stats.norm.sf(x, 0, noise) + q * stats.norm.sf(x, sign, noise)

    end = 1 + 12 * noise
    for epsilon in (0.05, 0.3, 1.0):
        begin = optimize.brentq(lambda x, e=epsilon: math.log(density(x, 1) / density(x, -1)) - e, 0, end, xtol=1e-14)
        exact = mass_beyond(begin, 1) - math.exp(epsilon) * mass_beyond(begin, -1)
        if exact < 1e-9:
            continue
        accountant = replaced(1000, 1000 * q, None, noise, 1.0, 1)
        (bound,) = accountant.deltas([epsilon], exact)
        assert exact <= bound * (1 + 1e-11) and bound <= exact * 1.02
        assert accountant.epsilon(exact).upper == pytest.approx(epsilon, rel=5e-3)


def test_two_releases_agree_with_a_sum_over_the_plane():
    q, noise, epsilon = 0.3, 1.0, 1.0
    x = np.linspace(-8, 9, 1701)
    p, other = ((1 - q) * stats.norm.pdf(x, 0, noise) + q * stats.norm.pdf(x, sign, noise) for sign in (1, -1))
    excess = np.maximum(np.outer(p, p) - math.exp(epsilon) * np.outer(other, other), 0.0)
    exact = float(excess.sum() * (x[1] - x[0]) ** 2)
    assert replaced(1000, 300, None, noise, 1.0, 2).epsilon(exact).upper == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize("q, noise", [(0.2, 0.8), (0.7, 1.3), (1.0, 1.0)])
def test_no_two_contents_in_the_plane_are_told_apart_more_easily(q, noise):
    """Any two contributions of norm at most 1, opposite or not, in either direction."""
    rng = np.random.default_rng(5)
    line = np.linspace(-7, 7, 561)
    x, y = np.meshgrid(line, line)
    cell = (line[1] - line[0]) ** 2
    accountant = replaced(1000, 1000 * q, None, noise, 1.0, 1)
    epsilons = np.array([0.02, 0.2, 0.7, 1.5])
    bounds = accountant.deltas(epsilons, 1e-6)

    def density(shift):
        def normal(a, b):
            return np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * noise**2)) / (2 * math.pi * noise**2)

        return (1 - q) * normal(0, 0) + q * normal(*shift)

    for trial in range(12):
        angles, radii = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0, 1, 2) if trial else np.ones(2)
        angles = angles if trial else np.array([0.0, math.pi])
        a, b = (density((r * math.cos(t), r * math.sin(t))) for r, t in zip(radii, angles, strict=True))
        for one, two in ((a, b), (b, a)):
            told = [float(np.maximum(one - math.exp(e) * two, 0).sum() * cell) for e in epsilons]
            assert (told <= bounds * (1 + 1e-3) + 1e-9).all()
            if not trial:  # opposite ones of norm 1 are the worst
                np.testing.assert_allclose(told, bounds, rtol=0.02)


@pytest.mark.parametrize("relation", [ZERO_OUT, ADD_OR_REMOVE])
@pytest.mark.parametrize("cap", [None, 330, 260])
def test_it_lies_between_presence_and_two_steps_over_the_empty_unit(cap, relation):
    """From one content to none, and from none to the other: delta(a) + e^a delta(b) at a + b."""
    plan = dp_sgd(10_000, 200, cap, 0.9, 1.0, 300, relation)
    once, content = Accountant(plan), Accountant(plan, replaced=True).epsilon(1e-6).upper
    splits = np.linspace(0.05, 40, 1200)
    deltas = once.deltas(splits, 1e-6)
    reached = [
        a + splits[enough[0]]
        for a, d in zip(splits, deltas, strict=True)
        if d < 1e-6 and (enough := np.flatnonzero(deltas <= (1e-6 - d) * math.exp(-a))).size
    ]
    assert once.epsilon(1e-6).lower <= content
    if cap != 260:
        assert content <= min(reached)
