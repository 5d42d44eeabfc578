"""Scattered residuals on a regular grid: the mean of a Gaussian process (simple kriging; Rasmussen and Williams 2006,
section 2.2).
"""

from collections.abc import Sequence

import numpy as np
from scipy import linalg

# Over how much of ln M, ln T and ln noise a residual stays about the same; how much a run is off, in ln loss.
_LENGTHS = (1.5, 1.0, 0.8)
_NOISE = 0.006
_SMALLEST_SPREAD = 0.004
_STEPS, _LEVELS = 24, 20


def on_a_grid(
    columns: Sequence[np.ndarray], values: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """(axes, values on them) of a residual that is known at scattered places.

    Args:
      columns: ln M, ln T and the place of the noise, of each value, arrays [n].
      values: the residuals, in ln loss, array [n].

    Returns:
      Axes of all sizes, and of evenly spaced steps and noise levels, and an array of their shape; far from all places
      it is zero.
    """
    at = np.stack(columns, axis=-1)
    axes = (
        np.unique(np.round(columns[0], 12)),
        np.linspace(columns[1].min(), columns[1].max(), _STEPS),
        np.linspace(columns[2].min(), columns[2].max(), _LEVELS),
    )
    spread = max(float(np.sqrt(np.mean(values**2))), _SMALLEST_SPREAD)
    covariance = _covariance(at, at, spread) + _NOISE**2 * np.eye(len(at))
    weights = linalg.cho_solve(linalg.cho_factor(covariance), values)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return axes, (_covariance(grid, at, spread) @ weights).reshape([len(axis) for axis in axes])


def _covariance(a: np.ndarray, b: np.ndarray, spread: float) -> np.ndarray:
    scaled = [x / np.array(_LENGTHS) for x in (a, b)]
    squared = np.square(scaled[0]).sum(axis=1)[:, None] + np.square(scaled[1]).sum(axis=1) - 2 * scaled[0] @ scaled[1].T
    return spread**2 * np.exp(-0.5 * np.maximum(squared, 0.0))
