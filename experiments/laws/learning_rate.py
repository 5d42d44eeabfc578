"""The best learning rate as a function of size, steps and noise: a quadratic fitted across all runs, as VaultGemma's
laws have it.
"""

import dataclasses
import math

import numpy as np
from scipy import optimize

# How far, in factors of two, one cell's vertex is off as a rule; those further off count less.
_SPREAD = 0.5


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """log2 of the best learning rate, as a quadratic of ln M, ln T and the logarithm of the noise, fitted across all
    runs.

    Attributes:
      coefficients: of the monomials, in the order of monomials.
      centre, width: by which each variable is made of order one.
      floor: noise-batch ratio below which less noise makes no difference.
      ends: log2 of the lowest and the highest rate that was tried, each moved out by one factor of two.
    """

    coefficients: tuple[float, ...]
    centre: tuple[float, ...]
    width: tuple[float, ...]
    floor: float
    ends: tuple[float, float]

    def __call__(self, parameters, steps, ratio) -> np.ndarray:
        value = monomials(self._variables(parameters, steps, ratio)) @ np.array(self.coefficients)
        return 2.0 ** np.clip(value, *self.ends)

    def _variables(self, parameters, steps, ratio) -> np.ndarray:
        return (_logs(parameters, steps, ratio, self.floor) - np.array(self.centre)) / np.array(self.width)


def fit_learning_rate(parameters, steps, ratio, log_rate) -> LearningRate:
    """By least squares (Huber's, against vertices that are far off).

    Args:
      parameters, steps, ratio: of each cell, arrays [n].
      log_rate: log2 of its best learning rate.
    """
    noisy = ratio[ratio > 0]
    floor = float(noisy.min()) if len(noisy) else 1.0
    raw = _logs(parameters, steps, ratio, floor)
    centre, width = raw.mean(axis=0), np.maximum(raw.std(axis=0), 1e-9)
    design, middle = monomials((raw - centre) / width), float(np.median(log_rate))
    # A faint pull to a constant settles what too few values of a variable cannot.
    ridge = 1e-3 * math.sqrt(len(log_rate)) * np.eye(design.shape[1])

    def residual(x):
        return np.concatenate([(design @ x - (log_rate - middle)) / _SPREAD, ridge @ x])

    coefficients = optimize.least_squares(residual, np.zeros(design.shape[1]), loss="huber").x
    coefficients[0] += middle
    ends = float(log_rate.min()) - 1, float(log_rate.max()) + 1
    return LearningRate(*(tuple(map(float, x)) for x in (coefficients, centre, width)), floor, ends)


def _logs(parameters, steps, ratio, floor: float) -> np.ndarray:
    columns = np.broadcast_arrays(np.log(parameters), np.log(steps), 0.5 * np.log(np.square(ratio) + floor**2))
    return np.stack(columns, axis=-1).astype(float)


def monomials(x: np.ndarray) -> np.ndarray:
    """1, the variables, their squares and products."""
    count = x.shape[-1]
    pairs = [x[..., i] * x[..., j] for i in range(count) for j in range(i, count)]
    return np.stack([np.ones(x.shape[:-1]), *np.moveaxis(x, -1, 0), *pairs], axis=-1)
