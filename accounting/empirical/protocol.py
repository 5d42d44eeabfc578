"""The audit protocol that a run registers in its ledger before its first step, and what comes of it.

A protocol names the scores, the bounds and the significance, which the bounds share. So nobody can choose afterwards
what suits the result.

Formal guarantee: if every bound holds as its module states, the probability that any number of `assess` exceeds the
true epsilon is at most the protocol's significance: each pair of score and bound, and within a bound each way to guess
and each threshold, has its share of it. Tested by
tests/accounting/empirical_test.py::test_a_protocol_shares_its_significance.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from accounting.empirical import gaussian, one_run, thresholds
from accounting.empirical.families import Curve, ScaledNoise, gaussian_epsilon, largest_ruled_out
from accounting.errors import InputError

VERSION = 1
SIGNIFICANCE = 0.05
# Shares of the canaries whose coins are guessed; the guesser abstains from the others.
GUESSED = (1.0, 0.3, 0.1, 0.03)

# Scores, each higher for canaries that seem to be included.
LOSS = "loss"  # the negative loss under the trained model
LOSS_AGAINST_START = "loss_against_start"  # by how much training lowered it
LIKELIHOOD_RATIO = "log_likelihood_ratio"  # of all steps, for whoever sees every release
SCORES = (LOSS, LOSS_AGAINST_START, LIKELIHOOD_RATIO)

ONE_RUN, ONE_RUN_CURVE = "one_run", "one_run_curve"
THRESHOLDS, THRESHOLDS_CURVE = "thresholds", "thresholds_curve"
GAUSSIAN = "gaussian"
BOUNDS = {
    ONE_RUN: "guesses of coins, for any mechanism (Steinke et al. 2023)",
    ONE_RUN_CURVE: "guesses of coins, by the mechanism's trade-off curve (Mahloujifar et al. 2024)",
    THRESHOLDS: "rates at thresholds, for independent scores (Clopper and Pearson 1934)",
    THRESHOLDS_CURVE: "rates at thresholds, by the mechanism's trade-off curve",
    GAUSSIAN: "difference of means, for independent Gaussian scores (noncentral t)",
}
# Points of a printed ROC.
_POINTS = 100


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is computed, and with which significance.

    Attributes:
      scores, bounds: names.
      guessed: shares of the canaries that are guessed.
      significance: the most that all bounds together may be wrong.
    """

    scores: tuple[str, ...]
    bounds: tuple[str, ...]
    guessed: tuple[float, ...] = GUESSED
    significance: float = SIGNIFICANCE

    def facts(self) -> dict[str, Any]:
        """As a ledger records it."""
        return {
            "version": VERSION,
            "scores": list(self.scores),
            "bounds": list(self.bounds),
            "guessed": list(self.guessed),
            "significance": self.significance,
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Protocol":
        """The inverse of `facts`.

        Raises:
          InputError: a protocol that this program does not know.
        """
        try:
            protocol = cls(
                tuple(facts["scores"]), tuple(facts["bounds"]), tuple(facts["guessed"]), facts["significance"]
            )
            known = set(protocol.scores) <= set(SCORES) and set(protocol.bounds) <= set(BOUNDS)
            sound = known and 0 < protocol.significance < 1 and all(0 < share <= 1 for share in protocol.guessed)
        except (KeyError, TypeError):
            sound = False
        if not sound or protocol.facts() != facts:
            raise InputError("the ledger's audit protocol is none that this version knows: run the one that wrote it")
        return protocol


def of_texts() -> Protocol:
    """For canaries that the model reads as text: what one model learns of them is coupled, so one-run bounds alone."""
    return Protocol((LOSS, LOSS_AGAINST_START), (ONE_RUN, ONE_RUN_CURVE))


def of_gradients(sampling_probability: float) -> Protocol:
    """For canaries with a coordinate of the gradient each."""
    bounds = (ONE_RUN, ONE_RUN_CURVE, THRESHOLDS, THRESHOLDS_CURVE)
    return Protocol((LIKELIHOOD_RATIO,), (*bounds, GAUSSIAN) if sampling_probability == 1 else bounds)


@dataclasses.dataclass(frozen=True)
class LowerBound:
    """One lower bound of epsilon.

    Attributes:
      score, bound: by their names.
      epsilon: at the run's delta; 0 where nothing is ruled out.
      contradicts: whether it rules out what was proved.
    """

    score: str
    bound: str
    epsilon: float
    contradicts: bool


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What an attack on a run's canaries shows.

    Attributes:
      canaries, included: how many there are, and how many of them were trained on.
      bounds: one for each score and bound of the protocol.
      roc: (false-positive rates, true-positive rates) of each score, empirical.
    """

    canaries: int
    included: int
    bounds: tuple[LowerBound, ...]
    roc: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]

    @property
    def epsilon(self) -> float:
        """The largest lower bound."""
        return max((bound.epsilon for bound in self.bounds), default=0.0)

    @property
    def contradicts(self) -> bool:
        return any(bound.contradicts for bound in self.bounds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: lower bounds are rounded down to four digits."""
        return {
            "canaries": self.canaries,
            "included": self.included,
            "lower_bound": _rounded_down(self.epsilon),
            "contradicts": self.contradicts,
            "bounds": [dataclasses.asdict(bound) | {"epsilon": _rounded_down(bound.epsilon)} for bound in self.bounds],
            "roc": {
                score: {"false_positive_rate": list(rates[0]), "true_positive_rate": list(rates[1])}
                for score, rates in self.roc.items()
            },
        }


def _rounded_down(epsilon: float) -> float:
    return math.floor(epsilon * 1e4) / 1e4


def assess(
    protocol: Protocol,
    scores: Mapping[str, np.ndarray],
    included: np.ndarray,
    delta: float,
    proven: float,
    family: ScaledNoise | None,
) -> Assessment:
    """The lower bounds of a registered protocol.

    Args:
      scores: float [m] by name, for every score of the protocol; of canaries that are in the data once at most.
      included: bool [m], the coins.
      delta: at which epsilon is stated.
      proven: the upper bound of epsilon; inf where nothing is claimed.
      family: of the run's mechanisms; None where nothing is claimed, and no curve can be tested.

    Raises:
      ValueError: a score that is missing, or not a number.
    """
    m = len(included)
    share = protocol.significance / (len(protocol.scores) * len(protocol.bounds))
    found = []
    for name in protocol.scores:
        values = np.asarray(scores[name], np.float64)
        if values.shape != (m,) or np.isnan(values).any():
            raise ValueError(f"score {name} needs one number for each of the {m} canaries")
        for bound in protocol.bounds:
            epsilon, contradicts = _bounded(bound, values, included, protocol.guessed, share, delta, proven, family)
            found.append(LowerBound(name, bound, epsilon, contradicts))
    roc = {name: _roc(np.asarray(scores[name], np.float64), included) for name in protocol.scores}
    return Assessment(m, int(included.sum()), tuple(found), roc)


def _bounded(
    bound: str,
    scores: np.ndarray,
    included: np.ndarray,
    guessed: tuple[float, ...],
    significance: float,
    delta: float,
    proven: float,
    family: ScaledNoise | None,
) -> tuple[float, bool]:
    """(lower bound of epsilon, whether it rules out what was proved)."""
    m, each = len(scores), significance / len(guessed)
    counts = []
    for guesses in (2 * int(share * m / 2) for share in guessed):
        if guesses > 0:
            counts.append((guesses, one_run.correct_guesses(scores, included, guesses)))
    if bound == ONE_RUN:
        found = [one_run.with_epsilon_delta(m, g, c, delta, each) for g, c in counts]
        return _plain(max(found, default=0.0), proven)
    if bound == ONE_RUN_CURVE:

        def rules_out(curve: Curve) -> bool:
            return any(one_run.contradicts(curve, m, g, c, each) for g, c in counts)

        return _of_family(family, rules_out)
    if bound == GAUSSIAN:
        return _plain(gaussian_epsilon(gaussian.mu(scores, included, significance), delta), proven)
    known = thresholds.rates(scores, included, significance)
    if bound == THRESHOLDS:
        return _plain(thresholds.with_epsilon_delta(known, delta), proven)
    return _of_family(family, lambda curve: thresholds.contradict(curve, known))


def _plain(epsilon: float, proven: float) -> tuple[float, bool]:
    return epsilon, epsilon > proven


def _of_family(family: ScaledNoise | None, rules_out: Callable[[Curve], bool]) -> tuple[float, bool]:
    """By what a run's own curve (x = 1), and those of more and of less noise, allow."""
    if family is None:
        return 0.0, False
    largest = largest_ruled_out(family, lambda leak: rules_out(family.tradeoff(leak)))
    return 0.0 if largest is None else family.epsilon(largest), rules_out(family.tradeoff(1.0))


def _roc(scores: np.ndarray, included: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates at about a hundred thresholds, from none above to all."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(included[order]) / max(1, included.sum())
    misses = np.cumsum(~included[order]) / max(1, (~included).sum())
    at = np.unique(np.geomspace(1, len(order), _POINTS).astype(int)) - 1 if len(order) else np.zeros(0, int)
    rounded = [tuple(round(float(x), 4) for x in (0.0, *values[at])) for values in (misses, hits)]
    return rounded[0], rounded[1]
