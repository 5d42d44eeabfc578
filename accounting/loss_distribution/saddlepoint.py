"""A fast estimate of the noise that a budget needs, for searches over thousands of configurations. It is no bound.

The saddle-point accountant (Alghamdi et al. 2023, arXiv 2208.09595) writes delta(epsilon) as an integral of exp(F(z)),
with F(z) = K(z) - epsilon z - ln z - ln(1 + z) and K the cumulant generating function of the composed privacy loss, and
takes the integrand's Gaussian shape and next terms at its saddle point. Whatever a search settles on must be certified
by accounting.calibration.
"""

import math
from typing import Any

import numpy as np
from scipy import special

from accounting.errors import InputError

_NODES = 640
_WIDTH = 9.0  # standard deviations on either side that the quadrature covers
_MOST_STEPS = 60
_LARGEST_TERM = 0.4
SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e7


def _cumulants(z: Any, probability: Any, noise: Any) -> tuple[Any, Any, Any, Any, Any]:
    """K(z) and its first four derivatives for one release, arrays [P]: the loss of removing a unit, under the data that
    hold it.
    """
    low, high = -_WIDTH * noise, z + 1 + _WIDTH * noise
    x = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, _NODES)
    variance = (noise**2)[:, None]
    with np.errstate(divide="ignore"):  # the logarithm of 1 - q where q is 1
        loss = np.logaddexp(
            np.log1p(-probability)[:, None], np.log(probability)[:, None] + (2 * x - 1) / (2 * variance)
        )
    # The density with the unit is exp(loss) times the one without it, so that tilting by z leaves exp((z + 1) loss) of
    # the latter.
    exponent = (z + 1)[:, None] * loss - x**2 / (2 * variance)
    top = exponent.max(axis=1, keepdims=True)
    weight = np.exp(exponent - top)
    mass = weight.sum(axis=1)
    step = (high - low) / (_NODES - 1)
    value = np.log(mass * step / (noise * math.sqrt(2 * math.pi))) + top[:, 0]
    weight /= mass[:, None]
    mean = (weight * loss).sum(axis=1)
    centred = loss - mean[:, None]
    moment = weight * centred * centred
    second = moment.sum(axis=1)
    moment *= centred
    third = moment.sum(axis=1)
    moment *= centred
    return value, mean, second, third, moment.sum(axis=1) - 3 * second**2


def _saddle(epsilon: float, probability: Any, noise: Any, releases: Any) -> np.ndarray:
    """ln of the z > 0 at which F has its only minimum, arrays [P]: Newton's method, kept between the ends that are
    known to enclose it.
    """
    mu = probability * np.sqrt(releases * np.expm1(np.minimum(noise**-2.0, 50.0)))
    log_z = np.log(np.maximum(epsilon, math.sqrt(epsilon) * mu) / mu**2 + 1.0)
    low, high = np.full(log_z.shape, -25.0), np.full(log_z.shape, 25.0)
    active = np.arange(len(log_z))
    for _ in range(_MOST_STEPS):
        z = np.exp(log_z[active])
        _, mean, second, _, _ = _cumulants(z, probability[active], noise[active])
        slope = releases[active] * mean - epsilon - 1 / z - 1 / (1 + z)
        curvature = releases[active] * second + z**-2 + (1 + z) ** -2
        low[active] = np.where(slope < 0, log_z[active], low[active])
        high[active] = np.where(slope < 0, high[active], log_z[active])
        step = slope / (curvature * z)
        moved = log_z[active] - step
        inside = (low[active] < moved) & (moved < high[active]) & (np.abs(step) < 3)
        log_z[active] = np.where(inside, moved, (low[active] + high[active]) / 2)
        active = active[~inside | (np.abs(step) > 1e-4)]
        if not len(active):
            break
    return log_z


def _log_delta(epsilon: float, probability: Any, noise: Any, releases: Any) -> tuple[np.ndarray, np.ndarray]:
    """ln of the estimated delta, and how large the terms are that the expansion ends with, arrays [P]."""
    z = np.exp(_saddle(epsilon, probability, noise, releases))
    value, _, second, third, fourth = _cumulants(z, probability, noise)
    exponent = releases * value - epsilon * z - np.log(z) - np.log1p(z)
    f2 = releases * second + z**-2 + (1 + z) ** -2
    f3 = releases * third - 2 * z**-3 - 2 * (1 + z) ** -3
    f4 = releases * fourth + 6 * z**-4 + 6 * (1 + z) ** -4
    terms = f4 / (8 * f2**2), -5 * f3**2 / (24 * f2**3)
    log_delta = exponent - 0.5 * np.log(2 * math.pi * f2) + np.log1p(np.clip(sum(terms), -0.5, 0.5))
    return log_delta, np.maximum(*map(np.abs, terms))


def noise_multiplier(
    epsilon: float, delta: float, sampling_probability: Any, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """An estimate of the noise multiplier with which Poisson-sampled DP-SGD meets (epsilon, delta) under add/remove,
    and its reliability.

    Where few steps with one dominating draw make up the tail (small q with small noise), the integrand is not Gaussian
    at all.

    Args:
      sampling_probability: q in (0, 1], any shape.
      steps: T, the same shape.

    Returns:
      (float64 of that shape, SMALLEST_NOISE where less would do, NaN where LARGEST_NOISE does not; bool, whether the
      expansion converges, or the least noise does).

    Raises:
      InputError: a budget that is none.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise InputError(
            f"a budget needs a positive finite epsilon and a delta between 0 and 1, got ({epsilon:g}, {delta:g})"
        )
    q, t = np.broadcast_arrays(np.asarray(sampling_probability, float), np.asarray(steps, float))
    shape, q, t = q.shape, q.ravel(), t.ravel()
    # What the central limit theorem says (Bu et al. 2020, arXiv 1911.11607) is where the search begins.
    mu = 1 / gaussian_noise_multiplier(epsilon, delta, 1.0)
    guess = np.log1p(mu**2 / (t * q**2)) ** -0.5
    x = np.log(np.clip(guess, SMALLEST_NOISE, LARGEST_NOISE))
    low, high = np.full(q.shape, math.log(SMALLEST_NOISE)), np.full(q.shape, math.log(LARGEST_NOISE))
    at_low, at_high = np.full(q.shape, np.nan), np.full(q.shape, np.nan)
    terms = np.full(q.shape, np.inf)
    active = np.arange(len(q))
    for _ in range(_MOST_STEPS):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            log_delta, terms[active] = _log_delta(epsilon, q[active], np.exp(x[active]), t[active])
            excess = log_delta - math.log(delta)
        excess = np.where(np.isfinite(excess), excess, 1e3)  # far below the noise that is needed
        above = excess > 0
        low[active], at_low[active] = np.where(above, x[active], low[active]), np.where(above, excess, at_low[active])
        high[active], at_high[active] = (
            np.where(above, high[active], x[active]),
            np.where(above, at_high[active], excess),
        )
        active = active[(np.abs(excess) > 1e-3) & (high[active] - low[active] > 1e-6)]
        if not len(active):
            break
        x[active] = _between(low[active], high[active], at_low[active], at_high[active])
    is_least, too_much = x < math.log(SMALLEST_NOISE) + 1e-3, x > math.log(LARGEST_NOISE) - 1e-3
    noise = np.where(too_much, np.nan, np.where(is_least, SMALLEST_NOISE, np.exp(x)))
    return noise.reshape(shape), (is_least | ((terms < _LARGEST_TERM) & ~too_much)).reshape(shape)


def _between(low: Any, high: Any, at_low: Any, at_high: Any) -> np.ndarray:
    """The next trial: by the secant where both ends are known and close, a step outward where one is not, else the
    middle.
    """
    with np.errstate(invalid="ignore"):
        secant = low + (high - low) * at_low / (at_low - at_high)
        trial = np.where(np.isnan(at_low), high - 0.7, np.where(np.isnan(at_high), low + 0.7, secant))
        known = ~np.isnan(at_low) & ~np.isnan(at_high)
        far = known & ((high - low > 1.0) | (at_low > 100))
    trial = np.where(far, (low + high) / 2, trial)
    # A secant that hugs one end would never move the other.
    margin = 0.02 * (high - low)
    return np.where(known, np.clip(trial, low + margin, high - margin), np.clip(trial, low, high))


def gaussian_noise_multiplier(epsilon: float, delta: float, releases: Any) -> np.ndarray:
    """The noise of so many releases without any help from sampling: closed form (Balle and Wang 2018, arXiv 1805.06530,
    theorem 8).
    """
    low, high = 1e-4, 1e6  # of mu, the ratio of sensitivity to noise after composition

    def delta_at(mu: Any) -> Any:
        return special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))

    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if delta_at(middle) <= delta else (low, middle)
    return np.sqrt(np.asarray(releases, float)) / low
