"""What all figures ask of a law: the best configurations of a compute, within what the law was fitted to and never
beyond it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from accounting.errors import InputError
from experiments.laws.law import Law
from experiments.planning import optimum
from experiments.planning.noise import NoiseSurface, estimate
from experiments.planning.optimum import Budget, Candidates

_VARIABLES = ("parameters", "batch_size", "steps")
_UNKNOWN = 1e30
_NEAR_AN_END = 1.1  # of the steps, between whose values in a search is more than that


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best configurations along the compute, for one number of units and one epsilon; NaN where the law knows none.

    Attributes:
      compute: [n], floating-point operations, rising.
      loss, parameters, batch_size, steps: [n], of the configuration with the lowest loss that spends exactly this
        compute.
      near: of each of parameters, batch_size and steps the least and the most [n, 2] among the configurations within 1
        % of it.
      tokens_per_parameter: [n], of that configuration.
    """

    num_units: float
    epsilon: float
    compute: np.ndarray
    loss: np.ndarray
    parameters: np.ndarray
    batch_size: np.ndarray
    steps: np.ndarray
    near: dict[str, np.ndarray]
    tokens_per_parameter: np.ndarray

    @property
    def running(self) -> np.ndarray:
        """The lowest loss of this compute or any smaller one."""
        return np.fmin.accumulate(self.loss)

    @property
    def knee(self) -> int | None:
        """The number of the least compute that comes within 1 % of the lowest loss of all; None where there is no
        configuration at all.
        """
        return optimum.saturating_compute(self.compute, self.loss) if np.isfinite(self.loss).any() else None


class Study:
    """Answers the figures' questions about a law, and keeps the answers.

    Args:
      law: of the loss.
      sequence_length: tokens of a unit.
      delta: of every privacy budget.
      cache: folder where noise is kept between processes; None for none.
      sizes: models to search between the smallest and the largest, which are two of them.
      points: of compute on a curve.
      noise: from epsilon to the noise multiplier of (steps, sampling probability), by default the estimate.
    """

    def __init__(
        self,
        law: Law,
        sequence_length: int,
        delta: float,
        cache: pathlib.Path | None = None,
        *,
        sizes: int = 60,
        points: int = 72,
        noise: Callable[[float], Callable] | None = None,
    ):
        self.law, self.sequence_length, self.delta = law, sequence_length, delta
        self.sizes, self.points = optimum.sizes_within(law, sizes), points
        self._surface = noise or (lambda epsilon: NoiseSurface(epsilon, delta, cache, estimate))
        self._surfaces: dict[float, Callable] = {}
        self._frontiers: dict[tuple, Frontier] = {}

    def noise(self, epsilon: float, steps, sampling_probability) -> np.ndarray:
        """Noise multipliers; more than any law was fitted to where no noise is known that meets the budget."""
        if epsilon not in self._surfaces:
            self._surfaces[epsilon] = self._surface(epsilon)
        # A law may refuse NaN or warn of infinities.
        return np.nan_to_num(self._surfaces[epsilon](steps, sampling_probability), nan=_UNKNOWN)

    def compute_range(self, num_units: float) -> tuple[float, float]:
        """From the smallest model and shortest run with batches of one unit to the largest and longest with all units
        in each batch.
        """
        (smallest, largest), (shortest, longest) = self.law.domain.parameters, self.law.domain.steps
        return 6 * self.sequence_length * smallest * shortest, 6 * self.sequence_length * largest * longest * num_units

    def candidates(self, compute: float, num_units: float, epsilon: float) -> Candidates | None:
        """All configurations of this compute that lie where the law was fitted, from the lowest loss up; None
        for none."""
        budget = Budget(compute, num_units, epsilon, self.delta, self.sequence_length)
        try:
            return optimum.search(self.law, lambda t, q: self.noise(epsilon, t, q), budget, self.sizes)
        except InputError:
            return None

    def best_loss(self, compute: float, num_units: float, epsilon: float) -> float:
        found = self.candidates(compute, num_units, epsilon)
        return math.nan if found is None else float(found.loss[0])

    def loss(self, parameters: float, steps: float, batch_size: float, num_units: float, epsilon: float) -> float:
        """Returns the predicted loss of one configuration; NaN outside of what the law was fitted to."""
        if not 0 < batch_size <= num_units:
            return math.nan
        noise = float(self.noise(epsilon, steps, batch_size / num_units))
        ratio = float(self.law.effective(noise / batch_size, batch_size, parameters))
        # As in a search: less noise than the least that was measured is no worse.
        ratio = max(ratio, self.law.domain.ratio[0])
        inside = self.law.domain.contains(parameters, steps, ratio)
        return float(self.law.loss(parameters, steps, ratio)) if inside else math.nan

    def losses_by_steps(self, steps: np.ndarray, compute: float, num_units: float, epsilon: float) -> np.ndarray:
        """Losses [T, M] of runs of so many steps with each of the sizes, whose batch spends the compute; NaN outside of
        the data.
        """
        size, steps = np.broadcast_arrays(self.sizes[None, :], np.asarray(steps, float)[:, None])
        batch = compute / (6 * self.sequence_length * size * steps)
        losses = np.full(batch.shape, np.nan)
        possible = (batch >= 1) & (batch <= num_units)
        if possible.any():
            m, t, b = size[possible], steps[possible], batch[possible]
            effective = self.law.effective(self.noise(epsilon, t, b / num_units) / b, b, m)
            ratio = np.maximum(effective, self.law.domain.ratio[0])
            losses[possible] = np.where(self.law.domain.contains(m, t, ratio), self.law.loss(m, t, ratio), np.nan)
        return losses

    def frontier(self, num_units: float, epsilon: float) -> Frontier:
        """The best configurations over all computes of compute_range."""
        key = num_units, epsilon
        if key not in self._frontiers:
            compute = np.geomspace(*self.compute_range(num_units), self.points)
            self._frontiers[key] = self._along(compute, num_units, epsilon)
        return self._frontiers[key]

    def _along(self, compute: np.ndarray, num_units: float, epsilon: float) -> Frontier:
        best = {name: np.full(len(compute), np.nan) for name in ("loss", *_VARIABLES)}
        near = {name: np.full((len(compute), 2), np.nan) for name in _VARIABLES}
        for i, operations in enumerate(compute):
            found = self.candidates(float(operations), num_units, epsilon)
            if found is None:
                continue
            close = optimum.near_optimal(found)
            for name, values in best.items():
                values[i] = getattr(found, name)[0]
            for name, ends in near.items():
                ends[i] = getattr(close, name).min(), getattr(close, name).max()
        tokens = best["steps"] * best["batch_size"] * self.sequence_length
        return Frontier(
            num_units, epsilon, compute, **best, near=near, tokens_per_parameter=tokens / best["parameters"]
        )

    def ends(self, parameters, steps) -> dict[str, np.ndarray]:
        """By the name of an end of the law's data, a mask of the configurations that lie at it: beyond it there may be
        better ones.
        """
        parameters, steps = np.asarray(parameters), np.asarray(steps)
        (smallest, largest), (shortest, longest) = self.law.domain.parameters, self.law.domain.steps
        return {
            "smallest model": parameters <= smallest * 1.001,
            "largest model": parameters >= largest * 0.999,
            "shortest run": steps < shortest * _NEAR_AN_END,
            "longest run": steps > longest / _NEAR_AN_END,
        }

    def at_an_end(self, parameters, steps) -> np.ndarray:
        """Mask of the configurations that are bounds and no optima."""
        return np.any(list(self.ends(parameters, steps).values()), axis=0)


def frontiers(study: Study, num_units: Sequence[float], epsilons: Sequence[float]) -> list[Frontier]:
    """Returns a Frontier for each number of units and epsilon, grouped by the number of units."""
    return [study.frontier(units, epsilon) for units in num_units for epsilon in epsilons]
