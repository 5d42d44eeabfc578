"""The best model, batch and number of steps for a compute, a privacy and a data budget (arXiv 2501.18914, sections 2
and 4).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize

from accounting.errors import InputError
from accounting.mechanism.sampling import MOST_STEPS, MOST_UNITS
from experiments.laws.law import Law
from experiments.laws.points import Points

# Configurations whose loss is within this share of the lowest are as good; of them the smallest model is the best to
# have.
NEAR = 0.01
_BATCHES_PER_DOUBLING = 4
# How many times beyond its data, in size, steps and noise, a law may be asked at all. Farther, forms that fit the same
# points choose models that differ by orders of magnitude.
BELIEVED = 4.0
_SIZES = 100


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
      compute: C in floating-point operations, 6 M B S T.
      num_units: N, privacy units.
      epsilon, delta: the privacy budget.
      sequence_length: S, tokens of a unit.
    """

    compute: float
    num_units: float
    epsilon: float
    delta: float
    sequence_length: int

    def __post_init__(self):
        if not (0 < self.compute < np.inf and 1 <= self.num_units < np.inf):
            raise InputError(
                f"need positive, finite compute and units, got {self.compute:g} operations and {self.num_units:g} units"
            )
        if self.num_units > MOST_UNITS:
            raise InputError(f"there may be at most {MOST_UNITS:g} units, got {self.num_units:g}: lower `num_units`")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Configurations that spend the same compute, all arrays [n], from the lowest loss up."""

    parameters: np.ndarray
    steps: np.ndarray
    batch_size: np.ndarray
    noise_multiplier: np.ndarray
    loss: np.ndarray
    inside: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Noise-batch ratios, of privacy's noise alone."""
        return self.noise_multiplier / self.batch_size

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep) -> "Candidates":
        return Candidates(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def sizes_within(law: Law, count: int = _SIZES) -> np.ndarray:
    """Model sizes to search, evenly spaced in logarithms over what was measured."""
    return np.geomspace(*law.domain.parameters, count)


def search(
    law: Law,
    noise: Callable[[np.ndarray, np.ndarray], np.ndarray],
    budget: Budget,
    sizes: Sequence[float],
    *,
    extrapolate: bool = False,
    batch_size: int | None = None,
    steps: int | None = None,
) -> Candidates:
    """Every configuration of the sizes and batches that spends the compute, with the loss that the law predicts.

    A noise-batch ratio below the least that was measured counts as that one, a bound from above: less noise is never
    worse.

    Args:
      noise: noise multiplier of (steps, sampling probability) under the privacy budget; NaN where there is none.
      extrapolate: whether steps, sizes and noise up to BELIEVED times beyond what was measured are allowed.
      batch_size, steps: one of them, where it is fixed.

    Raises:
      InputError: no configuration is left.
    """
    batches = 2.0 ** np.arange(0, np.log2(budget.num_units) + 1e-9, 1 / _BATCHES_PER_DOUBLING)
    if batch_size is not None:
        batches = np.array([float(batch_size)])
    m, b = (x.ravel() for x in np.meshgrid(np.asarray(sizes, float), batches, indexing="ij"))
    if steps is not None:
        m = np.asarray(sizes, float)
        b = budget.compute / (6 * budget.sequence_length * m * steps)
        m, b = m[(b >= 1) & (b <= budget.num_units)], b[(b >= 1) & (b <= budget.num_units)]
    t = budget.compute / (6 * budget.sequence_length * m * b)
    domain = law.domain
    far = BELIEVED if extrapolate else 1.0
    most = min(far * domain.steps[1], MOST_STEPS)
    smallest, largest = domain.parameters[0] / (1.001 * far), domain.parameters[1] * 1.001 * far
    allowed = (t >= max(1.0, domain.steps[0])) & (t <= most) & (m >= smallest) & (m <= largest)
    m, b, t = m[allowed], b[allowed], t[allowed]
    how_far = f"{far:g} times what the law was fitted to" if extrapolate else "what the law was fitted to"
    if not len(t):
        tokens, (few, many) = 6 * budget.sequence_length, (batches[0], batches[-1])
        sizes = [m for m in sizes if smallest <= m <= largest] or [smallest, largest]
        first, last = (domain.steps[0], most) if steps is None else (steps, steps)
        raise InputError(
            f"with {budget.compute:.3g} operations and {budget.num_units:.3g} units no run has between"
            f" {domain.steps[0]:.4g} and {most:.4g} steps, which is {how_far}: compute must lie between"
            f" {tokens * first * few * min(sizes):.2g} and {tokens * last * many * max(sizes):.2g}"
            + (
                "; beyond that no law of this table is believed: sweep larger models or longer runs"
                if extrapolate
                else ", or allow extrapolation"
            )
        )
    sigma = np.asarray(noise(t, b / budget.num_units), float)
    ratio = law.effective(sigma / b, b, m)
    counted = np.maximum(ratio, domain.ratio[0]) if not extrapolate else ratio
    known = np.isfinite(counted)
    loss = np.full(m.shape, np.nan)
    loss[known] = law.loss(m[known], t[known], counted[known])
    inside = domain.contains(m, t, counted)
    good = np.isfinite(loss) & (counted <= far * domain.ratio[1] if extrapolate else inside)
    if not good.any():
        raise InputError(
            "every configuration of this budget has a noise-batch ratio above"
            f" {far * domain.ratio[1]:.3g}, {'' if extrapolate else 'the most of '}{how_far}: raise epsilon, the number"
            " of units or the compute" + ("" if extrapolate else ", or allow extrapolation")
        )
    order = np.flatnonzero(good)[np.argsort(loss[good], kind="stable")]
    return Candidates(m[order], t[order], b[order], sigma[order], loss[order], inside[order])


def near_optimal(found: Candidates, share: float = NEAR) -> Candidates:
    """Those within a share of the lowest loss."""
    return found.where(found.loss <= found.loss[0] * (1 + share))


def preferred(found: Candidates, share: float = NEAR) -> int:
    """The number of the best one of the smallest model within a share of the lowest loss: it costs less to use."""
    near = near_optimal(found, share)
    return int(np.flatnonzero(near.parameters == near.parameters.min())[0])


def saturating_compute(compute: np.ndarray, loss: np.ndarray, share: float = NEAR) -> int:
    """The number of the least compute whose loss is within a share of the lowest of all."""
    return int(np.flatnonzero(loss <= np.nanmin(loss) * (1 + share))[0])


def marginal_values(solve: Callable[[Budget], float], budget: Budget) -> dict[str, float]:
    """The relative fall of the lowest loss where one budget is doubled and the others stay.

    Args:
      solve: the lowest loss of a budget.
    """
    now = solve(budget)
    values = {}
    for name in ("compute", "epsilon", "num_units"):
        try:
            larger = dataclasses.replace(budget, **{name: 2 * getattr(budget, name)})
            values[name] = 1 - solve(larger) / now
        except InputError:  # beyond what the law was fitted to, or beyond what there may be
            values[name] = float("nan")
    return values


@dataclasses.dataclass(frozen=True)
class NonPrivate:
    """Chinchilla's form L = E + A / M^alpha + B / D^beta of training without noise, D in tokens (arXiv 2203.15556,
    equation 2).
    """

    floor: float
    size_factor: float
    size_exponent: float
    data_factor: float
    data_exponent: float

    def loss(self, parameters, tokens) -> np.ndarray:
        parameters, tokens = np.asarray(parameters, float), np.asarray(tokens, float)
        return (
            self.floor
            + self.size_factor * parameters**-self.size_exponent
            + self.data_factor * tokens**-self.data_exponent
        )

    def optimum(self, compute: float) -> tuple[float, float]:
        """(parameters, tokens) of the lowest loss with 6 M D = C, in closed form (the same, equation 4)."""
        a, b = self.size_exponent, self.data_exponent
        ratio = (a * self.size_factor / (b * self.data_factor)) ** (1 / (a + b))
        parameters = ratio * (compute / 6) ** (b / (a + b))
        return parameters, compute / 6 / parameters


def fit_non_private(points: Points, tokens_per_step: float) -> NonPrivate:
    """Least squares of the residual in ln loss (Huber) over what was trained without noise, or with the least that
    there is.
    """
    clean = points.where(points.ratio == points.ratio.min())
    m, d, target = np.log(clean.parameters), np.log(clean.steps * tokens_per_step), np.log(clean.loss)
    centre = m.mean(), d.mean()

    def residual(x):
        e, a0, a, b0, b = x
        terms = np.stack([np.full(len(m), e), a0 - a * (m - centre[0]), b0 - b * (d - centre[1])])
        return np.logaddexp.reduce(terms, axis=0) - target

    bounds = ([-9, -12, 0.01, -12, 0.01], [np.log(clean.loss.min()), 4, 3, 4, 3])
    starts = [np.array([e, a0, 0.3, 0.0, 0.3]) for e in (-0.5, 0.2) for a0 in (-3.0, -1.0)]
    fits = [
        optimize.least_squares(
            residual,
            np.clip(x, np.array(bounds[0]) + 1e-6, np.array(bounds[1]) - 1e-6),
            bounds=bounds,
            loss="huber",
            f_scale=1e-3,
        )
        for x in starts
    ]
    e, a0, a, b0, b = min(fits, key=lambda fit: fit.cost).x
    return NonPrivate(
        float(np.exp(e)), float(np.exp(a0 + a * centre[0])), float(a), float(np.exp(b0 + b * centre[1])), float(b)
    )
