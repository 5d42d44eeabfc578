"""The audit protocol that a run registers in its ledger before its first step, and what comes of it.

A protocol names the scores, the bounds and the significance, which the bounds share. So nobody can choose afterwards
what suits the result.

Formal guarantee: if every bound holds as its module states, the probability that any of them is wrong is at most the
protocol's significance: each pair of score and bound, and within a bound each way to guess and each threshold, has its
share of it. A bound by a curve is wrong if the mechanism is one of the family that leaks less than it says; of other
mechanisms it says nothing. With probability 1 - `contradiction` or more, no bound contradicts what was proved of a
program that keeps it. Tested by tests/accounting/empirical_test.py::test_a_protocol_shares_its_significance and
::test_a_sound_run_is_not_contradicted_and_a_broken_one_is.
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
# Of the claim that a program is broken, which nobody should have to make of one run in twenty.
CONTRADICTION = 1e-6
# Shares of the canaries whose coins are guessed; the guesser abstains from the others.
GUESSED = (1.0, 0.3, 0.1, 0.03)

# Scores, each higher for canaries that seem to be included.
LOSS = "loss"  # the negative loss under the trained model
LOSS_AGAINST_START = "loss_against_start"  # by how much training lowered it
LOSS_AGAINST_REFERENCE = "loss_against_reference"  # how much lower it is than under a model without the canaries
LIKELIHOOD_RATIO = "log_likelihood_ratio"  # of all steps, for whoever sees every release

ONE_RUN, ONE_RUN_CURVE = "one_run", "one_run_curve"
THRESHOLDS, THRESHOLDS_CURVE = "thresholds", "thresholds_curve"
GAUSSIAN = "gaussian"
GRADIENT = "gradient"  # the kind of canaries that have a coordinate each

BOUNDS = {
    ONE_RUN: "guesses of coins, for any mechanism (Steinke et al. 2023)",
    ONE_RUN_CURVE: "guesses of coins, among mechanisms like this with other noise (Mahloujifar et al. 2024)",
    THRESHOLDS: "rates at thresholds, for independent scores (Clopper and Pearson 1934)",
    THRESHOLDS_CURVE: "rates at thresholds, for independent scores, among mechanisms like this with other noise",
    GAUSSIAN: "difference of means, for independent Gaussian scores (noncentral t)",
}
_BY_CURVE = (ONE_RUN_CURVE, THRESHOLDS_CURVE)
# Points of a printed ROC.
_POINTS = 100


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is computed, and with which significance.

    Attributes:
      scores, bounds: names.
      guessed: shares of the canaries that are guessed.
      significance: the most that all bounds together may be wrong.
      contradiction: the most that any of them may contradict what was proved of a sound program.
    """

    scores: tuple[str, ...]
    bounds: tuple[str, ...]
    guessed: tuple[float, ...] = GUESSED
    significance: float = SIGNIFICANCE
    contradiction: float = CONTRADICTION

    def facts(self) -> dict[str, Any]:
        """As a ledger records it."""
        return {
            "version": VERSION,
            "scores": list(self.scores),
            "bounds": list(self.bounds),
            "guessed": list(self.guessed),
            "significance": self.significance,
            "contradiction": self.contradiction,
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Protocol":
        """The inverse of `facts`.

        Raises:
          InputError: a protocol that this program does not know.
        """
        for known in (of_texts(), of_gradients(0.5), of_gradients(1.0)):
            if known.facts() == facts:
                return known
        raise InputError("the ledger's audit protocol is none that this version knows: run the one that wrote it")


def of_kind(kind: str, sampling_probability: float) -> Protocol:
    """How an attack on canaries of a kind is measured."""
    return of_gradients(sampling_probability) if kind == GRADIENT else of_texts()


def of_texts() -> Protocol:
    """For canaries that the model reads as text: what one model learns of them is coupled, so one-run bounds alone."""
    return Protocol((LOSS, LOSS_AGAINST_START), (ONE_RUN, ONE_RUN_CURVE))


def of_texts_against_reference() -> Protocol:
    """For a reference model that is named after the run: registered nowhere, so with a significance of its own."""
    return Protocol((LOSS_AGAINST_REFERENCE,), of_texts().bounds)


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
    m, parts = len(included), len(protocol.scores) * len(protocol.bounds)
    found = []
    for name in protocol.scores:
        values = np.asarray(scores[name], np.float64)
        if values.shape != (m,) or np.isnan(values).any():
            raise ValueError(f"score {name} needs one number for each of the {m} canaries")
        for bound in protocol.bounds:
            measure = _Measure(values, included, protocol.guessed, delta, family)
            epsilon = measure.epsilon(bound, protocol.significance / parts)
            contradicts = measure.exceeds(bound, protocol.contradiction / parts, proven)
            found.append(LowerBound(name, bound, max(epsilon, proven) if contradicts else epsilon, contradicts))
    roc = {name: _roc(np.asarray(scores[name], np.float64), included) for name in protocol.scores}
    return Assessment(m, int(included.sum()), tuple(found), roc)


@dataclasses.dataclass(frozen=True)
class _Measure:
    """What one score shows.

    Attributes:
      scores, included, guessed, delta, family: as `assess` has them.
    """

    scores: np.ndarray
    included: np.ndarray
    guessed: tuple[float, ...]
    delta: float
    family: ScaledNoise | None

    def epsilon(self, bound: str, significance: float) -> float:
        """A lower bound of epsilon."""
        if bound in _BY_CURVE:
            if self.family is None:
                return 0.0
            family, rules_out = self.family, self._rules_out(bound, significance)
            largest = largest_ruled_out(family, lambda leak: rules_out(family.tradeoff(leak)))
            return 0.0 if largest is None else family.epsilon(largest)
        if bound == ONE_RUN:
            m, each = len(self.scores), significance / len(self.guessed)
            found = [one_run.with_epsilon_delta(m, g, c, self.delta, each) for g, c in self._counts()]
            return max(found, default=0.0)
        if bound == GAUSSIAN:
            return gaussian_epsilon(gaussian.mu(self.scores, self.included, significance), self.delta)
        return thresholds.with_epsilon_delta(thresholds.rates(self.scores, self.included, significance), self.delta)

    def exceeds(self, bound: str, significance: float, proven: float) -> bool:
        """Whether it rules out what was proved: the certified curve, or an epsilon."""
        if bound in _BY_CURVE:
            return self.family is not None and self._rules_out(bound, significance)(self.family.own)
        return self.epsilon(bound, significance) > proven

    def _rules_out(self, bound: str, significance: float) -> Callable[[Curve], bool]:
        if bound == THRESHOLDS_CURVE:
            known = thresholds.rates(self.scores, self.included, significance)
            return lambda curve: thresholds.contradict(curve, known)
        m, each, counts = len(self.scores), significance / len(self.guessed), self._counts()
        return lambda curve: any(one_run.contradicts(curve, m, g, c, each) for g, c in counts)

    def _counts(self) -> list[tuple[int, int]]:
        """(guesses, right ones) of every way to guess."""
        ways = [2 * int(share * len(self.scores) / 2) for share in self.guessed]
        return [(g, one_run.correct_guesses(self.scores, self.included, g)) for g in ways if g > 0]


def _roc(scores: np.ndarray, included: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates at about a hundred thresholds, from none above to all."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(included[order]) / max(1, included.sum())
    misses = np.cumsum(~included[order]) / max(1, (~included).sum())
    at = np.unique(np.geomspace(1, len(order), _POINTS).astype(int)) - 1 if len(order) else np.zeros(0, int)
    rounded = [tuple(round(float(x), 4) for x in (0.0, *values[at])) for values in (misses, hits)]
    return rounded[0], rounded[1]
