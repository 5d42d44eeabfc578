"""Agreement with dp-accounting on more than two hundred settings, and with ourselves at ten times finer grids."""

import json
import pathlib

import numpy as np
import pytest
from scipy import optimize

from accounting import conversions
from accounting.accountant import Accountant
from accounting.loss_distribution import privacy_loss
from accounting.mechanism import dp_sgd
from tests.accounting.golden import make_dp_accounting

VALUES = json.loads((pathlib.Path(__file__).parent / "golden/dp_accounting.json").read_text())
GROUPS = sorted({tuple(row[:3]) for row in VALUES})


def sampled(groups, every):
    """One group in `every` is always tested, the others where slow tests are asked for."""
    return [group if i % every == 0 else pytest.param(group, marks=pytest.mark.slow) for i, group in enumerate(groups)]


def accountant(q, sigma, steps, width=2.5e-4):
    return Accountant(dp_sgd(10**7, q * 10**7, None, sigma, 1.0, steps), relative_width=width)


def test_there_are_enough_settings():
    assert len(VALUES) >= 200
    assert all(
        delta >= 1e-8 and 0.1 <= fine <= 20 and abs(coarse - fine) <= 2e-4 * fine for *_, delta, coarse, fine in VALUES
    )


@pytest.mark.parametrize("setting", sampled(GROUPS, 10), ids=str)
def test_agreement_with_dp_accounting(setting):
    ours = accountant(*setting)
    for *same, delta, _, theirs in VALUES:
        if tuple(same) == setting:
            bracket = ours.epsilon(delta)
            assert abs(bracket.upper - theirs) <= 5e-4 * theirs, (delta, bracket, theirs)
            assert bracket.lower <= theirs * (1 + 5e-4)


@pytest.mark.parametrize("setting", sampled(GROUPS[::4], 12), ids=str)
def test_upper_end_is_above_a_ten_times_finer_grid(setting):
    ours = accountant(*setting, width=1e-3)
    for *same, delta, _, _ in VALUES:
        if tuple(same) == setting:
            finer = ours.upper(delta, interval=ours.interval_for(delta) / 10)
            assert ours.epsilon(delta).upper >= finer * (1 - 1e-12)


def test_stored_values_are_what_dp_accounting_gives():
    q, sigma, steps, delta, coarse, _ = VALUES[len(VALUES) // 2]
    again = make_dp_accounting.epsilons(q, sigma, steps, 1e-4)[make_dp_accounting.DELTAS.index(delta)]
    assert again == pytest.approx(coarse, rel=1e-9)


def test_the_charged_rounding_error_of_normal_tails_is_larger_than_the_real_one():
    mpmath = pytest.importorskip("mpmath")
    z = np.sort(np.random.default_rng(0).uniform(-37, 37, 2000))
    masses, errors = privacy_loss._normal_intervals(z)
    with mpmath.workdps(60):

        def tail(x):
            return mpmath.erfc(x / mpmath.sqrt(2)) / 2

        for low, high, mass, error in zip(z[:-1], z[1:], masses, errors, strict=True):
            low, high = mpmath.mpf(float(low)), mpmath.mpf(float(high))
            exact = tail(low) - tail(high) if low + high > 0 else tail(-high) - tail(-low)
            assert abs(mass / exact - 1) <= error


def test_without_sampling_nothing_is_lost_to_cancellation():
    """q = 1, 100 steps at sigma 0.2: a Gaussian of sensitivity 10, whose epsilon has a closed form."""
    exact = optimize.brentq(lambda e: float(conversions.gaussian_delta(e, 50.0)) - 1e-5, 1000, 2000)
    assert exact <= Accountant(dp_sgd(100, 100, None, 0.2, 1.0, 100)).upper(1e-5) <= exact * 1.001
