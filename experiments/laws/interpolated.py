"""The published pipeline's law: power laws in the steps, and linear interpolation of logarithms between what was
measured (arXiv 2501.18914, section 3 and its code).
"""

import dataclasses
import math

import numpy as np
from scipy import interpolate, optimize

from accounting.errors import InputError
from experiments.laws.law import Domain
from experiments.laws.learning_rate import fit_learning_rate
from experiments.laws.points import Points

# Power laws in the steps are fitted from this share of the longest run on (16,000 of 128,000 in the paper), and
# believed up to this multiple of it (8,192,000).
_FIT_FROM, _LONGEST = 1 / 8, 64


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(T) = E + A / T^alpha."""

    floor: float
    factor: float
    exponent: float

    def __call__(self, steps) -> np.ndarray:
        return self.floor + self.factor * np.asarray(steps, float) ** -self.exponent


def fit_power_law(steps: np.ndarray, loss: np.ndarray, floor: float | None = None) -> PowerLaw:
    """Least squares, with E, A and alpha not negative; E may be given."""
    if len(steps) < (2 if floor is not None else 3):
        raise InputError("a power law in the steps needs at least three points: keep more of each curve")
    low = min(loss) * (1 - 1e-6)
    if floor is not None:
        fixed = min(floor, low)
        slope, intercept = np.polyfit(np.log(steps), np.log(np.maximum(loss - fixed, 1e-12)), 1)
        start = [max(-slope, 1e-3), math.log(max(math.exp(intercept), 1e-12))]

        def of(x):
            return fixed + np.exp(x[1] - x[0] * np.log(steps))

        found = optimize.least_squares(lambda x: of(x) / loss - 1, start, bounds=([0, -40], [10, 80]))
        return PowerLaw(fixed, math.exp(found.x[1]), found.x[0])
    centre = float(np.exp(np.log(steps).mean()))

    def of(x):
        return x[0] + np.exp(x[1] - x[2] * np.log(steps / centre))

    fits = [
        optimize.least_squares(
            lambda x: of(x) / loss - 1,
            [share * low, math.log(max(loss.mean() - share * low, 1e-9)), 0.3],
            bounds=([0, -40, 0], [low, 80, 10]),
        )
        for share in (0.9, 0.5, 0.1)
    ]
    x = min(fits, key=lambda fit: fit.cost).x
    return PowerLaw(float(x[0]), math.exp(x[1]) * centre ** x[2], float(x[2]))


class Interpolated:
    """Steps 3 and 4 of the published pipeline.

    Per model, the floor of the curve without noise (of the least noise, where none is without) is shared by all its
    noise levels. NaN outside of what was measured, except for steps, which the power laws extend.
    """

    name = "interpolated"

    def __init__(self, points: Points):
        self.domain = Domain.of(points)
        self._rate = fit_learning_rate(points.parameters, points.steps, points.ratio, np.log2(points.learning_rate))
        sizes, ratios = np.unique(points.parameters), np.unique(points.ratio)
        last = points.steps.max()
        beyond = last * 2.0 ** np.arange(1, int(math.log2(_LONGEST)) + 1)
        steps = np.concatenate([np.unique(points.steps), beyond])
        loss = np.full((len(sizes), len(steps), len(ratios)), np.nan)
        for i, size in enumerate(sizes):
            of_size = points.where(points.parameters == size)
            floor = None
            for k, ratio in enumerate(ratios):
                curve = of_size.where(of_size.ratio == ratio)
                if not len(curve):
                    continue
                loss[i, np.searchsorted(steps, curve.steps), k] = curve.loss
                late = curve.where(curve.steps >= _FIT_FROM * last)
                if len(late) < 3:
                    continue
                law = fit_power_law(late.steps, late.loss, floor)
                floor = law.floor if floor is None else floor
                loss[i, len(steps) - len(beyond) :, k] = law(beyond)
        self._sizes, self._steps, self._ratios = sizes, steps, ratios
        noisy = ratios > 0
        filled = _filled(np.log(loss[:, :, noisy]), np.log(ratios[noisy])) if noisy.any() else None
        axes = (np.log(sizes), np.log(steps))

        def regular(axes, values):
            return interpolate.RegularGridInterpolator(axes, values, bounds_error=False, fill_value=np.nan)

        self._noisy = regular((*axes, np.log(ratios[noisy])), filled) if noisy.sum() > 1 else None
        self._clean = regular(axes, np.log(loss[:, :, 0])) if ratios[0] == 0 else None

    def loss(self, parameters, steps, ratio) -> np.ndarray:
        m, t, r = np.broadcast_arrays(*(np.asarray(x, float) for x in (parameters, steps, ratio)))
        result = np.full(m.shape, np.nan)
        clean = r == 0
        if self._noisy is not None:
            result[~clean] = np.exp(self._noisy(np.log(np.stack([m[~clean], t[~clean], r[~clean]], axis=-1))))
        if self._clean is not None:
            result[clean] = np.exp(self._clean(np.log(np.stack([m[clean], t[clean]], axis=-1))))
        return result

    def learning_rate(self, parameters, steps, ratio) -> np.ndarray:
        return self._rate(parameters, steps, ratio)

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        return np.asarray(ratio, float)


def _filled(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Missing cells between two noise levels, by linear interpolation along the noise."""
    filled = values.copy()
    for line in filled.reshape(-1, values.shape[-1]):
        known = np.isfinite(line)
        if 2 <= known.sum() < len(line):
            inside = (x >= x[known].min()) & (x <= x[known].max()) & ~known
            line[inside] = np.interp(x[inside], x[known], line[known])
    return filled
