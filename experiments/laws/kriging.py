"""Universal kriging: a trend with unknown constants, and a Gaussian process for what it leaves unexplained.

The logarithm of a loss is ln trend(x; c) + g(x) + u(curve) + e: g is a Gaussian process with a squared-exponential
covariance, u what all points of one curve share because it is one run or a few, e what each point is off by itself. The
constants c are normal around their least-squares values, with the trend made linear there, so that what they leave open
is a part of every prediction's deviation (Cressie 1993, section 3.4; Rasmussen and Williams 2006, sections 2.7 and
5.4.1, on the marginal likelihood that chooses the covariance).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import linalg, optimize
from threadpoolctl import threadpool_limits

# Matrices of a few hundred rows: on a machine with other work, threads that wait for each other take ten times as long
# as one.
_one_thread = threadpool_limits.wrap(limits=1)
# Constants of forms are logarithms and exponents, of order one: their deviation before anything is measured.
_CONSTANTS = 1.0
# Medians and widths, in logarithms, of the covariance's numbers before anything is measured, and their bounds: spread
# of g, its lengths in ln M, ln T and the noise, deviations of a curve and of a point.
_MEDIANS = np.log([0.005, 1.5, 1.5, 1.5, 0.003, 0.003])
_WIDTHS = np.array([1.5, 0.6, 0.6, 0.6, 1.0, 1.0])
_BOUNDS = [tuple(np.log(ends)) for ends in ((3e-4, 0.1), (0.7, 3), (0.7, 6), (0.7, 8), (2e-4, 0.03), (2e-4, 0.03))]
_LARGEST_STEP = 0.5  # of a constant in a round


@dataclasses.dataclass(frozen=True)
class Trend:
    """A function of places [n, d] and constants [k], to an array [n], with the constants' bounds."""

    function: Callable[[np.ndarray, np.ndarray], np.ndarray]
    low: np.ndarray
    high: np.ndarray

    def slopes(self, places: np.ndarray, constants: np.ndarray) -> np.ndarray:
        """Derivatives with respect to the constants, array [n, k], by central differences."""
        steps = 1e-5 * np.eye(len(constants))
        return np.stack(
            [(self.function(places, constants + h) - self.function(places, constants - h)) / 2e-5 for h in steps],
            axis=-1,
        )


@dataclasses.dataclass(frozen=True)
class Kriged:
    """A trend and a process, given what was measured.

    Attributes:
      trend, constants: as fitted.
      covariance: logarithms of the six numbers (see _MEDIANS).
      evidence: ln of the marginal likelihood, and of the covariance's prior, at these.
      places: that were measured, array [n, d].
      weights: of the measured places in a prediction, array [n].
      factor: lower Cholesky factor of the covariance of all that was measured, array [n, n].
    """

    trend: Trend
    constants: np.ndarray
    covariance: np.ndarray
    evidence: float
    places: np.ndarray
    weights: np.ndarray
    factor: np.ndarray

    @_one_thread
    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what is added to the trend, standard deviation of the sum) at places [m, d]."""
        slopes = self.trend.slopes(places, self.constants)
        measured = self.trend.slopes(self.places, self.constants)
        across = _process(self.covariance, _squares(places, self.places)) + _CONSTANTS**2 * slopes @ measured.T
        before = np.exp(2 * self.covariance[0]) + _CONSTANTS**2 * np.square(slopes).sum(axis=1)
        explained = np.square(linalg.solve_triangular(self.factor, across.T, lower=True)).sum(axis=0)
        return across @ self.weights, np.sqrt(np.maximum(before - explained, 0.0))


@_one_thread
def fit(
    trend: Trend,
    constants: np.ndarray,
    places: np.ndarray,
    values: np.ndarray,
    curves: np.ndarray,
    covariance: np.ndarray | None = None,
    *,
    rounds: int = 2,
    iterations: int = 15,
) -> Kriged:
    """Chooses the covariance by its marginal likelihood and the constants by generalised least squares, in turn.

    Args:
      constants: from which they begin.
      places: ln M, ln T and the place of the noise of what was measured, array [n, 3].
      values: ln loss, array [n].
      curves: of which curve each is a part, integers [n].
      covariance: from which its choice begins, of a fit to nearly the same points; None for the prior's medians.
      rounds, iterations: of the turns, and of the search for the covariance in each; 0 to leave it as it is.
    """
    squares = _squares(places, places)
    same = (curves[:, None] == curves[None, :]).astype(float)
    chosen = _MEDIANS if covariance is None else covariance
    for _ in range(rounds):
        slopes = trend.slopes(places, constants)
        residual = values - trend.function(places, constants)
        if iterations:
            chosen = _most_likely(chosen, residual, _CONSTANTS**2 * slopes @ slopes.T, squares, same, iterations)
        solved = linalg.cho_factor(_measured(chosen, squares, same), lower=True)
        known = slopes.T @ linalg.cho_solve(solved, slopes) + np.eye(len(constants)) / _CONSTANTS**2
        step = np.linalg.solve(known, slopes.T @ linalg.cho_solve(solved, residual))
        constants = constants + np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        constants = np.clip(constants, trend.low + 1e-6, trend.high - 1e-6)
    slopes = trend.slopes(places, constants)
    residual = values - trend.function(places, constants)
    of_trend = _CONSTANTS**2 * slopes @ slopes.T
    evidence = -_misfit(chosen, residual, of_trend, squares, same)[0]
    factor = np.linalg.cholesky(_measured(chosen, squares, same) + of_trend)
    weights = linalg.cho_solve((factor, True), residual)
    return Kriged(trend, constants, chosen, evidence, places, weights, factor)


def _most_likely(start: np.ndarray, residual, of_trend, squares, same, iterations: int) -> np.ndarray:
    return optimize.minimize(
        _misfit,
        start,
        (residual, of_trend, squares, same),
        jac=True,
        method="L-BFGS-B",
        bounds=_BOUNDS,
        options={"maxiter": iterations},
    ).x


def _misfit(covariance: np.ndarray, residual, of_trend, squares, same) -> tuple[float, np.ndarray]:
    """Minus the logarithm of likelihood times prior, but for a constant, and its derivatives."""
    process = _process(covariance, squares)
    curve, point = np.exp(2 * covariance[4:])
    whole = process + curve * same + of_trend
    whole[np.diag_indices_from(whole)] += point
    factor = np.linalg.cholesky(whole)
    inverse, _ = linalg.lapack.dpotri(factor, lower=True)
    # Its upper triangle is zero, as that of the factor was.
    inverse = inverse + inverse.T
    inverse[np.diag_indices_from(inverse)] /= 2
    weights = inverse @ residual
    difference = inverse - np.outer(weights, weights)
    of_process = difference * process
    slope = np.array(
        [
            of_process.sum(),
            *(0.5 * np.tensordot(squares, of_process, 2) / np.exp(2 * covariance[1:4])),
            curve * np.vdot(difference, same),
            point * np.trace(difference),
        ]
    )  # fmt: skip
    away = (covariance - _MEDIANS) / _WIDTHS
    value = 0.5 * residual @ weights + np.log(np.diag(factor)).sum() + 0.5 * away @ away
    return float(value), slope + away / _WIDTHS


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances in each direction, array [d, n, m]."""
    return np.square(a.T[:, :, None] - b.T[:, None, :])


def _process(covariance: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.exp(2 * covariance[0] - 0.5 * np.tensordot(np.exp(-2 * covariance[1:4]), squares, 1))


def _measured(covariance: np.ndarray, squares: np.ndarray, same: np.ndarray) -> np.ndarray:
    whole = _process(covariance, squares) + np.exp(2 * covariance[4]) * same
    whole[np.diag_indices_from(whole)] += np.exp(2 * covariance[5])
    return whole
