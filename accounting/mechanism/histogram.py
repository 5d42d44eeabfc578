"""A histogram over public labels that is released once beside the steps of training."""

from accounting.errors import InputError
from accounting.mechanism import grid
from accounting.mechanism.mechanism import Mechanism, dp_sgd

# In units. A unit is `unit_steps` of a grid, which must be many.
SMALLEST_NOISE, LARGEST_NOISE = 0.01, 1e4


def histogram(num_units: int, noise: float, neighbouring_relation: str) -> Mechanism:
    """One release of counts to each of which a unit contributes at least 0, and to all of which together at most 1.

    So its L2 sensitivity is at most 1. Every unit takes part: there is no sampling that would hide it.

    Formal guarantee: such a release, with noise of this standard deviation, is no easier to tell from a neighbour's
    than what the returned mechanism charges: a Gaussian of standard deviation `noise` from itself shifted by 1. Tested
    by tests/accounting/accountant_test.py::test_what_is_released_besides_agrees_with_dp_accounting.

    >>> histogram(6000, noise=20, neighbouring_relation="zero_out").sampling_probability
    1.0

    Args:
      num_units: N; under add_or_remove as declared.
      noise: standard deviation of the noise on every count, in units.

    Raises:
      InputError: noise that hides nothing, or too much of it.
    """
    if not SMALLEST_NOISE <= noise <= LARGEST_NOISE:
        raise InputError(
            f"the noise of a histogram must lie between {SMALLEST_NOISE:g} and {LARGEST_NOISE:g} units, got {noise:g}:"
            " see `histogram_noise`"
        )
    return dp_sgd(
        num_units=num_units,
        expected_batch_size=num_units,
        max_batch_size=None,
        noise_multiplier=noise,
        clip_norm=1.0,
        steps=1,
        neighbouring_relation=neighbouring_relation,
        grid_bits=grid.LAW_BITS,
    )


def unit_steps(noise: float) -> int:
    """What a unit contributes, in whole numbers on whose grid the noise has a standard deviation of 2^LAW_BITS.

    Args:
      noise: standard deviation of the noise, in units.
    """
    return int(grid.sensitivity_steps(grid.LAW_BITS, noise))
