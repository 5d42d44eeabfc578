"""Laws: the loss, and the best learning rate, of a model size, a number of steps and a noise-batch ratio.

`SemiParametric` is a parametric form times what it leaves unexplained, tabulated from a mixture of kriged forms, with
how far off that may be. `interpolated.Interpolated` is the published pipeline.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from scipy import interpolate

from experiments.laws import forms
from experiments.laws.learning_rate import LearningRate, fit_learning_rate
from experiments.laws.mixture import Mixture, noise_axis, ratio_of
from experiments.laws.points import Points
from experiments.laws.sampling import Sampling

# How far beyond the data the tables reach, as factors of the size, the steps and the noise; farther out what is
# tabulated stays as it is there.
_BEYOND = 4.0, 16.0, 4.0
_SPACING = 0.4  # of the tables, in logarithms: below the shortest length of the process
_DIGITS = 6  # of tables in ln loss


@dataclasses.dataclass(frozen=True)
class Domain:
    """What was measured: the least and the most parameters, steps and noise-batch ratio."""

    parameters: tuple[float, float]
    steps: tuple[float, float]
    ratio: tuple[float, float]

    @classmethod
    def of(cls, points: Points) -> "Domain":
        return cls(*((float(x.min()), float(x.max())) for x in (points.parameters, points.steps, points.ratio)))

    def contains(self, parameters, steps, ratio) -> np.ndarray:
        """Mask of the configurations that lie within, ends included."""
        slack = 1 + 1e-9

        def within(x, ends):
            return (np.asarray(x) * slack >= ends[0]) & (np.asarray(x) <= ends[1] * slack)

        return within(parameters, self.parameters) & within(steps, self.steps) & within(ratio, self.ratio)

    def leaves(self, parameters: float, steps: float, ratio: float) -> list[str]:
        """Returns a sentence for each quantity in which one configuration lies outside the domain."""
        values = {
            "model size": (parameters, self.parameters),
            "steps": (steps, self.steps),
            "noise-batch ratio": (ratio, self.ratio),
        }
        return [
            f"{name} {value:.4g} is outside of {ends[0]:.4g} to {ends[1]:.4g}"
            for name, (value, ends) in values.items()
            if not ends[0] / (1 + 1e-9) <= value <= ends[1] * (1 + 1e-9)
        ]


class Law(Protocol):
    """What searches need of a law. All arguments broadcast."""

    domain: Domain

    def loss(self, parameters, steps, ratio) -> np.ndarray: ...

    def learning_rate(self, parameters, steps, ratio) -> np.ndarray: ...

    def deviation(self, parameters, steps, ratio) -> np.ndarray:
        """Standard deviation of the predicted ln loss."""
        ...

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        """The ratio that stands for a noise-batch ratio in batches of this size (sampling.Sampling)."""
        ...


@dataclasses.dataclass(frozen=True)
class SemiParametric:
    """A parametric trend times what it leaves unexplained, on a grid that reaches beyond the data.

    Attributes:
      trend: the form that explains the most.
      axes: of the tables: ln M, ln T, and the place of the noise (mixture.noise_axis).
      residual: what is added to the ln of the trend, array of the axes' shape.
      deviations: the standard deviation of ln loss, likewise.
      rate: of the best learning rate.
      sampling: how the batch enters the noise, which everywhere here is the effective one.
    """

    trend: forms.Parametric
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    residual: np.ndarray
    deviations: np.ndarray
    rate: LearningRate
    domain: Domain
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    name = "semiparametric"

    def loss(self, parameters, steps, ratio) -> np.ndarray:
        """The loss; it never falls where only the noise grows.

        At the noise levels of the grid it is the highest of what trend and residual say at this level or at a lower
        one; between two of them it goes from one to the other as the trend does.
        """
        m, t, r = np.broadcast_arrays(*(np.asarray(x, float) for x in (parameters, steps, ratio)))
        levels = self._levels
        rising = np.maximum.accumulate(self._raw(m[..., None], t[..., None], levels), axis=-1)
        below = np.clip(np.searchsorted(levels, r, side="right") - 1, 0, len(levels) - 1)
        above = np.minimum(below + 1, len(levels) - 1)
        low, high = (np.take_along_axis(rising, i[..., None], axis=-1)[..., 0] for i in (below, above))
        here, first, last = (self.trend.loss(m, t, x) for x in (r, levels[below], levels[above]))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(last > first, (here - first) / (last - first), 1.0)
        between = low + (high - low) * np.clip(share, 0.0, 1.0)
        return np.where(r > levels[-1], np.maximum(self._raw(m, t, r), rising[..., -1]), between)

    def deviation(self, parameters, steps, ratio) -> np.ndarray:
        """The standard deviation of the predicted ln loss; the noise of a single run is not a part of it."""
        return _interpolated(self.axes, self.deviations, self._places(parameters, steps, ratio))

    @property
    def _levels(self) -> np.ndarray:
        """The noise-batch ratios of the grid; the first is none."""
        return ratio_of(self.axes[2], self.rate.floor)

    def _raw(self, parameters, steps, ratio) -> np.ndarray:
        """What trend and residual say of one place by itself."""
        explained = self.trend.loss(parameters, steps, ratio)
        return explained * np.exp(_interpolated(self.axes, self.residual, self._places(parameters, steps, ratio)))

    def _places(self, parameters, steps, ratio) -> tuple[np.ndarray, ...]:
        noise = noise_axis(np.asarray(ratio, float), self.rate.floor)
        return tuple(np.broadcast_arrays(np.log(parameters), np.log(steps), noise))

    def learning_rate(self, parameters, steps, ratio) -> np.ndarray:
        return self.rate(parameters, steps, ratio)

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        return self.sampling.effective(ratio, batch_size, parameters)

    def as_dict(self) -> dict:
        largest = self.sampling.largest_batch
        return {
            "trend": dataclasses.asdict(self.trend),
            "axes": [axis.tolist() for axis in self.axes],
            "residual": self.residual.tolist(),
            "deviations": self.deviations.tolist(),
            "rate": dataclasses.asdict(self.rate),
            "domain": dataclasses.asdict(self.domain),
            "sampling": dataclasses.asdict(self.sampling) | {"largest_batch": None if math.isinf(largest) else largest},
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "SemiParametric":
        return cls(
            trend=forms.Parametric(**as_tuples(stored["trend"])),
            axes=tuple(np.array(axis) for axis in stored["axes"]),
            residual=np.array(stored["residual"]),
            deviations=np.array(stored["deviations"]),
            rate=LearningRate(**as_tuples(stored["rate"])),
            domain=Domain(**as_tuples(stored["domain"])),
            sampling=Sampling(
                **stored["sampling"] | {"largest_batch": stored["sampling"]["largest_batch"] or math.inf}
            ),
        )


def as_tuples(content: dict) -> dict:
    """What JSON has made lists of, as it was."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in content.items()}


def tabulated(mixture: Mixture, points: Points, sampling: Sampling, widened: float = 1.0) -> SemiParametric:
    """The law of a mixture that was fitted to these points.

    Args:
      widened: by which its deviations are multiplied (validation.cross_validate).
    """
    rate = fit_learning_rate(points.parameters, points.steps, points.ratio, np.log2(points.learning_rate))
    domain = Domain.of(points)
    size, length, noise = _BEYOND
    axes = (
        _axis(math.log(domain.parameters[0] / size), math.log(domain.parameters[1] * size)),
        _axis(math.log(domain.steps[0]), math.log(domain.steps[1] * length)),
        _axis(float(noise_axis(0.0, rate.floor)), float(noise_axis(noise * domain.ratio[1], rate.floor))),
    )
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    log_loss, deviations = (values.reshape(places.shape[:-1]) for values in mixture.at(places.reshape(-1, 3)))
    residual = log_loss - mixture.trend_at(places.reshape(-1, 3)).reshape(log_loss.shape)
    return SemiParametric(
        mixture.trend,
        axes,
        np.round(residual, _DIGITS),
        np.round(widened * deviations, _DIGITS),
        rate,
        domain,
        sampling,
    )


def _axis(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 1 + math.ceil((high - low) / _SPACING))


def _interpolated(axes, values: np.ndarray, places) -> np.ndarray:
    """Linear interpolation on a grid, constant beyond its edges."""
    inside = [np.clip(place, axis[0], axis[-1]) for place, axis in zip(places, axes, strict=True)]
    return interpolate.RegularGridInterpolator(axes, values)(np.stack(inside, axis=-1)).reshape(places[0].shape)
