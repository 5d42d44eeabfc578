"""The attack on a run's canaries: the scores of its registered protocol, and the lower bounds that follow.

Formal guarantee: scores are functions of what the run releases (the final parameters; for gradient canaries every
noised sum, beside the other units' clipped gradients, which an attacker may know) and of the canaries' contents, and
never of their coins. Tested by tests/training/attack_test.py::test_scores_do_not_know_the_coins.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from accounting.empirical import protocol as protocol_lib
from accounting.empirical.families import ScaledNoise
from accounting.empirical.protocol import Assessment, Protocol
from accounting.ledger.executed import Executed
from accounting.mechanism import Mechanism
from dpgemma.data.canaries import Canaries
from dpgemma.data.source import InMemory
from dpgemma.objectives.causal import NATS_PER_TOKEN
from dpgemma.objectives.protocol import Objective
from dpgemma.training.evaluation import measure

# Rows of observations that are held in memory at once.
_STEPS_AT_ONCE = 64


def text_scores(
    objective: Objective,
    trained: tuple[Any, Any],
    start: tuple[Any, Any],
    canaries: Canaries,
    advance: Callable[[int], None] = lambda units: None,
) -> dict[str, np.ndarray]:
    """Scores float64 [m] of canaries that are text: minus their loss, and by how much training lowered it.

    Args:
      trained, start: (trainable, frozen) parameters at the end and at the beginning.
      advance: is told how many more canaries were measured.
    """

    after, before = (losses(objective, parameters, canaries, advance) for parameters in (trained, start))
    return {protocol_lib.LOSS: -after, protocol_lib.LOSS_AGAINST_START: before - after}


def losses(
    objective: Objective,
    parameters: tuple[Any, Any],
    canaries: Canaries,
    advance: Callable[[int], None] = lambda units: None,
) -> np.ndarray:
    """Losses float64 [m] of canaries that are text, in nats.

    Args:
      parameters: trainable and frozen ones.
      advance: is told how many more canaries were measured.
    """
    found = measure(objective, *parameters, InMemory(canaries.columns), advance=advance)
    return found.numerators[NATS_PER_TOKEN]


def likelihood_ratio(observed: np.ndarray, sampling_probability: float, noise_multiplier: float) -> np.ndarray:
    """Log-likelihood ratio float64 [m] of being included: the best test of two data sets that differ in one canary.

    A canary that is included moves its number by 1, in sensitivities, whenever it is drawn: a step's ratio is
    1 - q + q exp((2 y - 1) / (2 sigma^2)) (Abadi et al. 2016, arXiv 1607.00133, section 3.2).

    >>> likelihood_ratio(np.array([[0.5, 1.5]]), sampling_probability=1.0, noise_multiplier=1.0)
    array([0., 1.])

    Args:
      observed: float32 [steps, m], in sensitivities.
    """
    total = np.zeros(observed.shape[1])
    for first in range(0, len(observed), _STEPS_AT_ONCE):
        y = np.asarray(observed[first : first + _STEPS_AT_ONCE], np.float64)
        ratio = (2 * y - 1) / (2 * noise_multiplier**2)
        if sampling_probability < 1:
            ratio = np.logaddexp(math.log1p(-sampling_probability), math.log(sampling_probability) + ratio)
        total += ratio.sum(axis=0)
    return total


def observed_scores(observed: np.ndarray, mechanism: Mechanism) -> dict[str, np.ndarray]:
    """The score of gradient canaries, by the noise that the run declares."""
    ratio = likelihood_ratio(observed, mechanism.sampling_probability, mechanism.gradient_noise_multiplier)
    return {protocol_lib.LIKELIHOOD_RATIO: ratio}


def assess(
    protocol: Protocol,
    scores: dict[str, np.ndarray],
    canaries: Canaries,
    executed: Executed,
) -> Assessment | None:
    """The lower bounds that the scores give, against what the run's accountant proves.

    Canaries that are planted several times are several units, of which the guarantee of one unit says nothing; they are
    for memorisation alone.

    Returns:
      None where every canary is planted several times.
    """
    single = canaries.repeats == 1
    if not single.any():
        return None
    accountant = executed.accountant()
    proven = accountant.epsilon(executed.delta).upper
    family = ScaledNoise(accountant.mechanisms, executed.delta, accountant.also) if math.isfinite(proven) else None
    return protocol_lib.assess(
        protocol,
        {name: values[single] for name, values in scores.items()},
        canaries.included[single],
        executed.delta,
        proven,
        family,
    )
