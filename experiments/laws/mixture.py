"""What several forms of a law, each with a process for what it leaves unexplained, say together.

Each form counts by its evidence (kriging), tempered: points of one curve, and curves that share a learning rate's
parabola, are not as many independent measurements as the likelihood takes them for. The deviation of the mixture is
that of its members and of their disagreement, which grows with the distance from the data.
"""

import dataclasses

import numpy as np

from experiments.laws import forms, kriging
from experiments.laws.kriging import Kriged
from experiments.laws.points import Points

# By which the ln of the evidence is divided.
_TEMPER = 3.0
# What no member knows of: the smoothing makes neighbours alike, by which deviations are multiplied, and the parabola
# that all points share moves all of them, by this share of their noise. Measured on planted laws, and held against
# others in tests/experiments/coverage_test.py.
_SMOOTHED, _SHARED = 1.15, 0.25
_LEAST_WEIGHT = 1e-3
_WARM_ITERATIONS = 5


def noise_axis(ratio, floor: float) -> np.ndarray:
    """ln r from the floor on, and nearly a constant below it, so that no noise at all has a place on the same axis."""
    return 0.5 * np.log(np.square(ratio) + (floor / 2) ** 2)


def ratio_of(place, floor: float) -> np.ndarray:
    """The noise-batch ratio at a place of the noise axis."""
    squared = np.exp(2 * np.asarray(place)) - (floor / 2) ** 2
    return np.sqrt(np.where(squared > 1e-9 * floor**2, squared, 0.0))


@dataclasses.dataclass(frozen=True)
class Member:
    """A form, kriged, and how much it counts."""

    form: str
    scale: tuple[float, float]
    kriged: Kriged
    weight: float

    @property
    def trend(self) -> forms.Parametric:
        return forms.Parametric(self.form, tuple(map(float, self.kriged.constants)), self.scale)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Kriged forms with weights that add up to one, the heaviest first.

    Attributes:
      floor: of the noise axis.
    """

    members: tuple[Member, ...]
    floor: float

    @property
    def trend(self) -> forms.Parametric:
        """The form that counts the most."""
        return self.members[0].trend

    @property
    def noise(self) -> float:
        """The standard deviation of a measured ln loss around the one that is predicted without any error."""
        return float(np.sqrt(sum(m.weight * np.exp(2 * m.kriged.covariance[4:]).sum() for m in self.members)))

    def alone(self, form: str) -> "Mixture":
        """One form without the others."""
        (member,) = (member for member in self.members if member.form == form)
        return Mixture((dataclasses.replace(member, weight=1.0),), self.floor)

    def places(self, parameters, steps, ratio) -> np.ndarray:
        """ln M, ln T and the place of the noise, array [n, 3]."""
        columns = np.broadcast_arrays(np.log(parameters), np.log(steps), noise_axis(ratio, self.floor))
        return np.stack([np.ravel(column) for column in columns], axis=-1)

    def trend_at(self, places: np.ndarray) -> np.ndarray:
        """ln of the heaviest form, array [n]."""
        return self.members[0].kriged.trend.function(places, self.members[0].kriged.constants)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln loss, its standard deviation) at places [n, 3]."""
        total, squares = np.zeros(len(places)), np.zeros(len(places))
        for member in self.members:
            if member.weight > _LEAST_WEIGHT:
                added, deviation = member.kriged.at(places)
                log_loss = member.kriged.trend.function(places, member.kriged.constants) + added
                total += member.weight * log_loss
                squares += member.weight * (deviation**2 + log_loss**2)
        weight = sum(member.weight for member in self.members if member.weight > _LEAST_WEIGHT)
        mean = total / weight
        apart = np.maximum(squares / weight - mean**2, 0.0)
        return mean, np.sqrt(_SMOOTHED**2 * apart + (_SHARED * self.noise) ** 2)


def fit(points: Points, start: Mixture | None = None) -> Mixture:
    """Fits every form to the points, and weighs them.

    Args:
      start: a mixture of nearly the same points, from which this one begins.
    """
    noisy = points.ratio[points.ratio > 0]
    floor = float(noisy.min()) if len(noisy) else 1.0
    curves = np.unique(np.stack([points.parameters, points.ratio], axis=-1), axis=0, return_inverse=True)[1].reshape(-1)
    places = np.stack([np.log(points.parameters), np.log(points.steps), noise_axis(points.ratio, floor)], axis=-1)
    found = []
    for name, form in forms.FORMS.items():
        earlier = None if start is None else next(m for m in start.members if m.form == name)
        whole = forms.fit(points, name, None if earlier is None else earlier.trend)
        trend = kriging.Trend(_log_loss(form, whole.scale, floor), np.array(form.low), np.array(form.high))
        kriged = kriging.fit(
            trend,
            np.array(whole.constants),
            places,
            np.log(points.loss),
            curves,
            covariance=None if earlier is None else earlier.kriged.covariance,
            **({} if earlier is None else {"rounds": 1, "iterations": _WARM_ITERATIONS}),
        )
        found.append((name, whole.scale, kriged))
    evidence = np.array([kriged.evidence for _, _, kriged in found])
    weights = np.exp((evidence - evidence.max()) / _TEMPER)
    members = [Member(*parts, float(weight)) for parts, weight in zip(found, weights / weights.sum(), strict=True)]
    return Mixture(tuple(sorted(members, key=lambda member: -member.weight)), floor)


def _log_loss(form: forms.Form, scale: tuple[float, float], floor: float):
    def function(places: np.ndarray, constants: np.ndarray) -> np.ndarray:
        size, steps = np.exp(places[:, 0]) / scale[0], np.exp(places[:, 1]) / scale[1]
        return np.log(form.function(constants, size, steps, ratio_of(places[:, 2], floor)))

    return function
