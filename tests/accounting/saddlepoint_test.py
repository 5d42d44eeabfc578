import numpy as np
import pytest

from accounting import calibration
from accounting.errors import InputError
from accounting.loss_distribution import saddlepoint
from accounting.mechanism import dp_sgd

# (epsilon, delta, q, T): budgets of laptops, of the scaling-law paper and of full batches.
BUDGETS = [
    (8, 1e-5, 0.06, 600),
    (1, 1e-8, 0.0082, 2500),
    (16, 1e-8, 0.074, 12_000),
    (1, 1e-6, 1.0, 100),
    (4, 1e-8, 1.0, 1),
    (50, 1e-5, 0.01, 100),
]


@pytest.mark.parametrize("epsilon, delta, q, steps", BUDGETS)
def test_estimate_agrees_with_the_certified_calibration(epsilon, delta, q, steps):
    sigma, reliable = saddlepoint.noise_multiplier(epsilon, delta, q, steps)
    exact = calibration.noise_multiplier(
        dp_sgd(10**6, q * 10**6, None, 1.0, 1.0, steps), epsilon, delta
    ).noise_multiplier
    assert reliable
    assert float(sigma) == pytest.approx(exact, rel=1e-3)


def test_it_says_where_it_cannot_be_relied_on():
    # VaultGemma's budget: rare draws of one unit make up the tail, and the expansion diverges.
    sigma, reliable = saddlepoint.noise_multiplier(1.7105, 1.1e-10, 4.0802e-5, 100_000)
    assert not reliable and abs(float(sigma) / 0.614 - 1) > 0.02


def test_without_sampling_it_is_the_closed_form():
    steps = np.array([1.0, 10.0, 1000.0])
    sigma, _ = saddlepoint.noise_multiplier(2.0, 1e-6, 1.0, steps)
    closed = saddlepoint.gaussian_noise_multiplier(2.0, 1e-6, steps)
    np.testing.assert_allclose(sigma, closed, rtol=1e-3)
    # Balle and Wang's mechanism by dp-accounting.
    from dp_accounting import gaussian_mechanism

    assert closed[0] == pytest.approx(gaussian_mechanism.get_sigma_gaussian(2.0, 1e-6), rel=1e-6)


@pytest.mark.parametrize("epsilon, delta", [(0, 1e-5), (np.inf, 1e-5), (1, 0), (1, 1)])
def test_budgets_that_are_none_are_refused(epsilon, delta):
    with pytest.raises(InputError, match="positive finite epsilon"):
        saddlepoint.noise_multiplier(epsilon, delta, 0.1, 10)
