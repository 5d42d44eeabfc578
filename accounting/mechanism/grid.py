"""The grid on which sums are exact: how fine it is, and what that is worth.

A step of the grid is a fixed share of the noise, sigma * sensitivity / 2^bits, so one law of integers serves every run.
`dpgemma.privacy.integer_noise` draws it, and says what is certified about it.
"""

import math

# The finest law: its standard deviation is (nearly) 2^LAW_BITS steps.
LAW_BITS = 26
# Per coordinate, the law hides a shift as well as a Gaussian does whose standard deviation is smaller by this share.
SHORTFALL = 2.0**-11
# That holds but for an event of this probability per coordinate and step: noise beyond 11.5 standard deviations.
TAIL = 2.0**-99
# Numbers in one release. A larger model is refused.
MOST_COORDINATES = 2**36

# Gradients have 24 bits; a finer grid would show nothing.
_MOST_STEPS = 2**24
# Share of the clip norm that rounding to the grid may take: steps of g move P numbers by at most g sqrt(P) / 2 on
# average.
_ROUNDING = 0.005
# Standard deviations of the noise that fit on the grid beside the sum.
_ROOM = 16
_RANGE = 2**31


def sensitivity_steps(bits: int, noise_multiplier: float) -> float:
    """R, the sensitivity in steps of the grid, for noise whose standard deviation is 2^bits steps.

    >>> round(sensitivity_steps(20, 2.0) / 2**19, 4)
    0.9995
    """
    return 2.0**bits * (1 - SHORTFALL) / noise_multiplier


def fitting_bits(noise_multiplier: float, max_batch_size: int, coordinates: int) -> int:
    """The number of bits with which no sum can wrap around; more of them where the grid would be too coarse.

    >>> fitting_bits(1.0, 700, 250_000), fitting_bits(0.6, 500_000, 10**9)
    (21, 21)

    Args:
      noise_multiplier: sigma, positive.
      max_batch_size: the most units in a sum.
      coordinates: P, numbers in a sum.
    """
    finest = min(LAW_BITS, math.floor(math.log2(_MOST_STEPS * noise_multiplier)))
    safe = math.floor(math.log2(_RANGE / (max_batch_size / noise_multiplier + _ROOM)))
    precise = math.ceil(math.log2(math.sqrt(coordinates) / 2 / _ROUNDING * noise_multiplier))
    return max(1, min(finest, max(safe, precise)))


def largest_mean(bits: int, noise_multiplier: float, max_batch_size: int) -> float:
    """The largest coordinate of a batch's mean clipped gradient, in clip norms, that cannot wrap around; 1 or more
    where nothing can.
    """
    room = _RANGE - _ROOM * 2.0**bits
    return room / sensitivity_steps(bits, noise_multiplier) / max_batch_size


def tail_delta(releases: int, epsilon: float) -> float:
    """What the ends of the noise's law add to delta, in any run of so many releases.

    The law and the ideal one that it is charged as differ with a probability of at most TAIL in each coordinate, so
    their distance is at most eta = TAIL * MOST_COORDINATES * releases, and delta grows by (1 + e^epsilon) eta.
    """
    eta = TAIL * MOST_COORDINATES * releases
    return eta * (1 + math.exp(min(epsilon, 700.0)))
