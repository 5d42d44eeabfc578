"""Laws: the loss, and the best learning rate, of a model size, a number of steps and a noise-batch ratio.

`Interpolated` is the published pipeline: power laws in the steps, and linear interpolation of logarithms between what
was measured (arXiv 2501.18914, section 3 and its code). `SemiParametric` is a parametric form, and between the measured
points what it leaves unexplained, interpolated. Beyond them, each direction has a rule of its own: larger models and
more noise follow forms, which need not be the same, from the edge on; longer runs the power law that each curve follows
at its end.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from scipy import interpolate, optimize

from accounting.errors import InputError
from experiments.laws import forms, kriging
from experiments.laws.learning_rate import LearningRate, fit_learning_rate
from experiments.laws.points import Points
from experiments.laws.sampling import Sampling

# Power laws in the steps are fitted from this share of the longest run on (16,000 of 128,000 in the paper), and
# believed up to this multiple of it (8,192,000).
_FIT_FROM, _LONGEST = 1 / 8, 64
# Points beyond this share of the longest run decide how a curve is extrapolated; candidate floors, as shares of the
# lowest loss.
_TAIL_FROM, _FLOORS = 1 / 3, np.linspace(0.0, 0.9, 19)
# Floors are compared by how well the points before last / _TOLD_AHEAD steps predict those after it.
_TOLD_AHEAD = 2.0
_FORMS = ("trend", "larger", "noisier")
# Cells of the grid of all sizes, steps and noise levels that must have been measured for it to be taken as it is.
_LEAST_SHARE = 0.25
# Bandwidth, in ln T, with which the residual is smoothed along the steps.
_BANDWIDTH = 0.3


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

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        """The ratio that stands for a noise-batch ratio in batches of this size (sampling.Sampling)."""
        ...


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


@dataclasses.dataclass(frozen=True)
class Tail:
    """How losses fall beyond the longest run: L(T) = E + (L(T_last) - E) (T / T_last)^-alpha, alpha of each size and
    noise level.

    Attributes:
      floor: E, the same for all curves: one curve's end hardly settles it, all together do.
      exponents: alpha on the residual's axes of size and noise.
    """

    floor: float
    exponents: np.ndarray


@dataclasses.dataclass(frozen=True)
class SemiParametric:
    """A parametric trend, times what it leaves unexplained, interpolated between the measured points and constant
    beyond their edges.

    Attributes:
      trend: the form that is fitted between the points.
      larger, noisier: the forms that the loss follows beyond the largest model, and beyond the most noise.
      axes: of the residual: ln M, ln T, and the place of the noise (noise_axis).
      residual: ln of measured over trend on those axes, array of their shape.
      tail: for steps beyond the last.
      rate: of the best learning rate.
      sampling: how the batch enters the noise, which everywhere here is the effective one.
    """

    trend: forms.Parametric
    larger: forms.Parametric
    noisier: forms.Parametric
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    residual: np.ndarray
    tail: Tail
    rate: LearningRate
    domain: Domain
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    name = "semiparametric"

    def loss(self, parameters, steps, ratio) -> np.ndarray:
        """The loss; it never falls where only the noise grows.

        At the noise levels that were measured it is the highest of what trend and residual say at this level or at a
        lower one; between two of them it goes from one to the other as the trend does.
        """
        m, t, r = np.broadcast_arrays(*(np.asarray(x, float) for x in (parameters, steps, ratio)))
        levels = self._levels
        rising = np.maximum.accumulate(self._raw(m[..., None], t[..., None], levels), axis=-1)
        below = np.clip(np.searchsorted(levels, r, side="right") - 1, 0, len(levels) - 1)
        above = np.minimum(below + 1, len(levels) - 1)
        low, high = (np.take_along_axis(rising, i[..., None], axis=-1)[..., 0] for i in (below, above))
        size, within = np.minimum(m, self.domain.parameters[1]), np.clip(t, *self.domain.steps)
        here, first, last = (self.trend.loss(size, within, x) for x in (r, levels[below], levels[above]))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(last > first, (here - first) / (last - first), 1.0)
        between = low + (high - low) * np.clip(share, 0.0, 1.0)
        return np.where(r > levels[-1], np.maximum(self._raw(m, t, r), rising[..., -1]), between)

    @property
    def _levels(self) -> np.ndarray:
        """The noise-batch ratios that were measured, and twice and four times the highest."""
        place = np.exp(2 * self.axes[2]) - (self.rate.floor / 2) ** 2
        measured = np.sqrt(np.where(place > 1e-9 * self.rate.floor**2, place, 0.0))
        return np.append(measured, [2 * measured[-1], 4 * measured[-1]])

    def _raw(self, parameters, steps, ratio) -> np.ndarray:
        """What trend, residual and the forms beyond the edges say of one place by itself."""
        m, t, r = np.broadcast_arrays(*(np.asarray(x, float) for x in (parameters, steps, ratio)))
        domain = self.domain
        within = np.clip(t, *domain.steps)
        size, noise = np.minimum(m, domain.parameters[1]), np.minimum(r, domain.ratio[1])
        places = (np.log(size), np.log(within), self._noise_axis(noise))
        loss = self.trend.loss(size, within, noise) * np.exp(_interpolated(self.axes, self.residual, places))
        loss = loss * self.noisier.loss(size, within, r) / self.noisier.loss(size, within, noise)
        loss = loss * self.larger.loss(m, within, r) / self.larger.loss(size, within, r)
        exponent = _interpolated((self.axes[0], self.axes[2]), self.tail.exponents, (places[0], places[2]))
        # A law that is asked far outside of its data may already be below the floor: then it stays where it is.
        above = np.maximum(loss - self.tail.floor, 0.0)
        return loss - above * (1 - (t / within) ** -exponent)

    def learning_rate(self, parameters, steps, ratio) -> np.ndarray:
        return self.rate(parameters, steps, ratio)

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        return self.sampling.effective(ratio, batch_size, parameters)

    def _noise_axis(self, ratio) -> np.ndarray:
        return noise_axis(ratio, self.rate.floor)

    def as_dict(self) -> dict:
        largest = self.sampling.largest_batch
        return {
            **{name: dataclasses.asdict(getattr(self, name)) for name in _FORMS},
            "axes": [axis.tolist() for axis in self.axes],
            "residual": self.residual.tolist(),
            "tail": {"floor": self.tail.floor, "exponents": self.tail.exponents.tolist()},
            "rate": dataclasses.asdict(self.rate),
            "domain": dataclasses.asdict(self.domain),
            "sampling": {"kappa": self.sampling.kappa, "largest_batch": None if math.isinf(largest) else largest},
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "SemiParametric":
        return cls(
            **{name: forms.Parametric(**as_tuples(stored[name])) for name in _FORMS},
            axes=tuple(np.array(axis) for axis in stored["axes"]),
            residual=np.array(stored["residual"]),
            tail=Tail(stored["tail"]["floor"], np.array(stored["tail"]["exponents"])),
            rate=LearningRate(**as_tuples(stored["rate"])),
            domain=Domain(**as_tuples(stored["domain"])),
            sampling=_stored_sampling(stored.get("sampling", {})),
        )


def _stored_sampling(stored: dict) -> Sampling:
    """Laws of runs with one batch need not have stored it."""
    return Sampling(stored.get("kappa", 0.0), stored.get("largest_batch") or math.inf)


def as_tuples(content: dict) -> dict:
    """What JSON has made lists of, as it was."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in content.items()}


def noise_axis(ratio, floor: float) -> np.ndarray:
    """ln r from the floor on, and nearly a constant below it, so that no noise at all has a place on the same axis."""
    return 0.5 * np.log(np.square(ratio) + (floor / 2) ** 2)


def _interpolated(axes, values: np.ndarray, places) -> np.ndarray:
    """Linear interpolation on a grid, constant beyond its edges; axes of one value cannot be interpolated along, and
    need not be.
    """
    kept = [i for i, axis in enumerate(axes) if len(axis) > 1]
    if not kept:
        return np.full(places[0].shape, values.item())
    inside = [np.clip(places[i], axes[i][0], axes[i][-1]) for i in kept]
    grid = interpolate.RegularGridInterpolator([axes[i] for i in kept], values.reshape([len(axes[i]) for i in kept]))
    return grid(np.stack(inside, axis=-1)).reshape(places[0].shape)


def fit_semiparametric(
    points: Points,
    form: str,
    start: forms.Parametric | None = None,
    *,
    larger: str | None = None,
    noisier: str | None = None,
) -> SemiParametric:
    """Fits the forms, then tabulates the residual; a cell without a measurement takes the mean of its neighbours'
    residuals. Where most cells are without one, as where runs of several batches have noise levels of their own, the
    residual is interpolated by kriging.

    Args:
      form: of the trend.
      start: a trend of nearly the same points, from which its fit begins.
      larger, noisier: forms for larger models and for more noise; the trend's, if none is named.
    """
    trend = forms.fit(points, form, start)
    beyond = [trend if name in (None, form) else forms.fit(points, name) for name in (larger, noisier)]
    rate = fit_learning_rate(points.parameters, points.steps, points.ratio, np.log2(points.learning_rate))
    columns = (np.log(points.parameters), np.log(points.steps), noise_axis(points.ratio, rate.floor))
    axes, places = zip(*(np.unique(np.round(column, 12), return_inverse=True) for column in columns), strict=True)
    unexplained = np.log(points.loss) - np.log(trend.loss(points.parameters, points.steps, points.ratio))
    if len(points) < _LEAST_SHARE * math.prod(len(axis) for axis in axes):
        axes, residual = kriging.on_a_grid(columns, unexplained)
        size, steps, noise = np.meshgrid(*axes, indexing="ij")
        places = np.indices(residual.shape).reshape(3, -1)
        ratio = np.sqrt(np.maximum(np.exp(2 * noise) - (rate.floor / 2) ** 2, 0.0))
        at = [x.ravel() for x in (np.exp(size), np.exp(steps), ratio)]
        loss = trend.loss(*at) * np.exp(residual.ravel())
        tail = _fit_tail(Points(*at, loss, np.ones(loss.shape)), places, residual.shape)
    else:
        residual = np.full([len(axis) for axis in axes], np.nan)
        residual[places] = unexplained
        residual = _smooth(_spread(residual), axes[1])
        tail = _fit_tail(points, places, residual.shape)
    return SemiParametric(trend, *beyond, axes, residual, tail, rate, Domain.of(points))


def _fit_tail(points: Points, places, shape: tuple[int, int, int]) -> Tail:
    """Returns the floor with which the middles of the curves best predict their ends, and the ends' exponents."""
    last = points.steps.max()
    curves = {
        (i, k): points.where((places[0] == i) & (places[2] == k)) for i in range(shape[0]) for k in range(shape[2])
    }
    ends = {cell: curve.where(curve.steps >= _TAIL_FROM * last) for cell, curve in curves.items()}
    ends = {cell: curve for cell, curve in ends.items() if len(curve) >= 3}
    if not ends:
        raise InputError("a law needs at least three points at the end of its curves: keep more of each curve")

    def misfit(floor: float) -> float:
        total = 0.0
        for cell in ends:
            steps, loss = curves[cell].steps, curves[cell].loss
            late = steps > last / _TOLD_AHEAD
            middle = ~late & (steps >= _TAIL_FROM * last / _TOLD_AHEAD)
            if middle.sum() >= 3 and late.any():
                slope, intercept = np.polyfit(np.log(steps[middle]), np.log(loss[middle] - floor), 1)
                told = floor + np.exp(intercept + min(slope, 0.0) * np.log(steps[late]))
                total += float(np.mean((told / loss[late] - 1) ** 2))
        return total

    floor = min((share * points.loss.min() for share in _FLOORS), key=misfit)
    exponents = np.full((shape[0], shape[2]), np.nan)
    for cell, curve in ends.items():
        exponents[cell] = max(-np.polyfit(np.log(curve.steps), np.log(curve.loss - floor), 1)[0], 0.0)
    return Tail(float(floor), _spread(exponents))


def _smooth(residual: np.ndarray, log_steps: np.ndarray) -> np.ndarray:
    """Local straight lines along the steps, so that a search for the lowest loss does not find the luckiest
    measurement.
    """
    distance = log_steps[None, :] - log_steps[:, None]
    weight = np.exp(-0.5 * (distance / _BANDWIDTH) ** 2)
    # The value at its own place of each weighted straight line, as a linear function of what is fitted.
    moments = [(weight * distance**k).sum(axis=1, keepdims=True) for k in range(3)]
    slope_is_known = moments[0] * moments[2] - moments[1] ** 2 > 1e-12 * moments[0] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        line = weight * (moments[2] - moments[1] * distance) / (moments[0] * moments[2] - moments[1] ** 2)
    rows = np.where(slope_is_known, line, weight / moments[0])
    return np.einsum("js,isk->ijk", rows, residual)


def _spread(values: np.ndarray) -> np.ndarray:
    """Missing cells as the mean of the known ones next to them, again and again until none is left."""
    values = values.copy()
    while np.isnan(values).any():
        known = np.isfinite(values)
        total, count = np.zeros(values.shape), np.zeros(values.shape)
        for axis in range(values.ndim):
            for shift in (1, -1):
                neighbour = np.roll(np.where(known, values, 0.0), shift, axis)
                there = np.roll(known, shift, axis).astype(float)
                edge = [slice(None)] * values.ndim
                edge[axis] = 0 if shift == 1 else -1
                neighbour[tuple(edge)] = there[tuple(edge)] = 0.0
                total, count = total + neighbour, count + there
        values = np.where(~known & (count > 0), total / np.maximum(count, 1), values)
    return values
