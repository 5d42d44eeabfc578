"""The noise multiplier as a function of steps and sampling probability, for searches: estimated on a lattice,
interpolated, kept.

The lattice is the same for all searches with one (epsilon, delta), so that each pays only for the nodes that no search
before has asked for. A node is the saddle-point estimate where that converges, and else the loss-distribution
accountant's upper bound on a coarse grid; the two agree within a percent or so. Beyond MOST_STEPS_BY_LOSSES the losses
of single steps are so small that a grid which resolves them would hold millions, and the estimate has to do (within 1 %
at 2e8 steps). No number from here is a guarantee: `certified` is.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np
from scipy import optimize

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.loss_distribution import saddlepoint
from accounting.mechanism import dp_sgd
from dpgemma import user_cache

# Distance of lattice nodes, in ln T and in ln q.
SPACING = math.log(2.5)
_LARGE = 10**15  # units of a data set that stands for a sampling probability alone
# Intervals of the loss grid, how each is refined, and the relative change of epsilon at which a grid is fine enough.
# The error falls at least linearly with the interval, so what is left is a third of the change. The coarsest grid is
# for budgets up to _USUAL, and coarser for larger ones.
_COARSEST, _FINEST, _FINER, _CHANGE, _USUAL = 4e-3, 1e-5, 4.0, 0.01, 8.0
_COARSE = 1e-3  # the finest grid of a correction: within half a percent
MOST_STEPS_BY_LOSSES = 10**7
_LOWEST = math.log(saddlepoint.SMALLEST_NOISE)
_VERSION = 6
_TOLERANCE = 1e-3  # of a certified noise multiplier, and of its epsilon


class NoiseSurface:
    """sigma(steps, q) for one budget, under Poisson sampling.

    Args:
      epsilon, delta: the budget.
      cache: folder where nodes are kept between processes; None keeps them in memory alone.
      estimate: noise multipliers and their reliability, as saddlepoint.noise_multiplier gives them.
    """

    def __init__(
        self, epsilon: float, delta: float, cache: pathlib.Path | None = None, estimate=saddlepoint.noise_multiplier
    ):
        if not (0 < epsilon < math.inf and 0 < delta < 1):
            raise InputError(
                f"a budget needs a positive finite epsilon and a delta between 0 and 1, got ({epsilon:g}, {delta:g})"
            )
        self.epsilon, self.delta = epsilon, delta
        self.cache, self._estimate = cache, estimate
        self._file = None if cache is None else cache / f"noise_{_name(epsilon, delta, estimate)}.json"
        self._nodes = _read(self._file)

    def __call__(self, steps, sampling_probability) -> np.ndarray:
        """Noise multipliers, shape of the arguments; NaN where q is above 1 or no noise of a sensible size is enough.

        Where less noise would do than the least that is sensible, it is that one.
        """
        t, q = np.broadcast_arrays(np.asarray(steps, float), np.asarray(sampling_probability, float))
        possible = (t >= 1) & (q > 0) & (q <= 1)
        u, v = np.log(np.where(possible, t, 1.0)) / SPACING, np.log(np.where(possible, q, 1.0)) / SPACING
        first_u, weights_u = _cubic(u, lowest=0)
        first_v, weights_v = _cubic(v, highest=0)
        wanted = {
            (i, j) for i, j in zip(first_u[possible].ravel().tolist(), first_v[possible].ravel().tolist(), strict=True)
        }
        self._compute({(i + a, j + b) for i, j in wanted for a in range(4) for b in range(4)})
        total = np.zeros(u.shape)
        for a in range(4):
            for b in range(4):
                # Nodes are looked up once for each distinct pair, not once for each point.
                total += weights_u[a] * weights_v[b] * self._at(first_u + a, first_v + b, possible)
        # Between nodes at its lower end a cubic may swing below it.
        return np.where(possible, np.maximum(np.exp(total), saddlepoint.SMALLEST_NOISE), np.nan)

    def _at(self, i, j, possible) -> np.ndarray:
        pairs = np.stack([i[possible], j[possible]], axis=-1)
        unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
        values = np.array([self._nodes[int(a), int(b)] for a, b in unique] or [0.0])
        found = np.zeros(i.shape)
        found[possible] = values[inverse.reshape(-1)] if len(unique) else 0.0
        return found

    def _compute(self, nodes: set[tuple[int, int]]) -> None:
        missing = sorted(nodes - self._nodes.keys())
        if not missing:
            return
        t, q = (np.exp(SPACING * np.array(axis, float)) for axis in zip(*missing, strict=True))
        estimates, reliable = self._estimate(self.epsilon, self.delta, q, t)
        for node, steps, probability, sigma, good in zip(missing, t, q, estimates, reliable, strict=True):
            if not good and steps <= MOST_STEPS_BY_LOSSES:
                sigma = by_losses(self.epsilon, self.delta, steps, probability, sigma)
            self._nodes[node] = math.log(sigma) if math.isfinite(sigma) else math.nan
        _write(self._file, self._nodes)


class CorrectedNoise:
    """Estimated noise, which near one place may be corrected by the accountant: for plans, which are certified at the
    end, and of which the noise elsewhere decides nothing.

    Args:
      epsilon, delta, cache: as in NoiseSurface.
    """

    def __init__(self, epsilon: float, delta: float, cache: pathlib.Path | None = None):
        self._surface = NoiseSurface(epsilon, delta, cache, estimate)
        self._at, self._correction = np.zeros(1), np.zeros(1)

    def __call__(self, steps, sampling_probability) -> np.ndarray:
        """Noise multipliers, as NoiseSurface has them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            correction = np.interp(np.log(sampling_probability), self._at, self._correction)
        return self._surface(steps, sampling_probability) * np.exp(correction)

    def correct_around(self, steps: float, sampling_probability: float) -> bool:
        """Corrects the noise by the accountant's at a place, and at half and twice its batch with twice and half its
        steps, where the estimate does not converge at one of them. Returns whether it did.
        """
        epsilon, delta = self._surface.epsilon, self._surface.delta
        shares, lengths = sampling_probability * np.array([0.5, 1.0, 2.0]), steps * np.array([2.0, 1.0, 0.5])
        lengths, shares = lengths[shares <= 1], shares[shares <= 1]
        guesses, converged = saddlepoint.noise_multiplier(epsilon, delta, shares, lengths)
        if converged.all() or lengths.max() > MOST_STEPS_BY_LOSSES:
            return False
        accurate = [
            by_losses(epsilon, delta, *each, finest=_COARSE) for each in zip(lengths, shares, guesses, strict=True)
        ]
        correction = np.log(accurate / guesses)
        if not np.isfinite(correction).all():
            return False
        self._at, self._correction = np.log(shares), correction
        return True


def estimate(epsilon: float, delta: float, sampling_probability, steps) -> tuple[np.ndarray, np.ndarray]:
    """The saddle-point estimate, taken for reliable everywhere (for NoiseSurface): for questions that need an answer
    soon.

    At the optima of arXiv 2501.18914, table 2, it is within 2.3 % of the certified noise. Where the expansion does not
    converge it asks for up to half as much noise again as needed, in batches so small that nothing is best there.
    """
    noise, _ = saddlepoint.noise_multiplier(epsilon, delta, sampling_probability, steps)
    return noise, np.ones(noise.shape, bool)


def by_losses(
    epsilon: float, delta: float, steps: float, probability: float, guess: float, finest: float = _FINEST
) -> float:
    """The noise multiplier by the accountant, on ever finer grids of losses until a finer one changes epsilon by less
    than _CHANGE, or `finest` is passed; NaN above the noise that is searched.
    """
    units, interval = probability * _LARGE, _coarsest(epsilon)

    def excess(log_sigma: float) -> float:
        mechanism = dp_sgd(_LARGE, units, None, math.exp(log_sigma), 1.0, max(1, round(steps)))
        bound = Accountant(mechanism).upper(delta, interval=interval)
        return math.log(max(bound, 1e-9) / epsilon) if math.isfinite(bound) else 50.0

    found, step = math.log(guess) if math.isfinite(guess) else 0.0, 0.05
    while True:
        found = _root(excess, found, step)
        interval, step = interval / _FINER, 0.004  # a finer grid moves it by little
        settled = not math.isfinite(found) or found == _LOWEST
        if settled or interval < finest or abs(excess(found)) < _CHANGE:
            return math.exp(found)


def _coarsest(epsilon: float) -> float:
    return _COARSEST * max(1.0, epsilon / _USUAL)


def _root(excess: Callable[[float], float], start: float, step: float = 0.05, precision: float = 3e-3) -> float:
    """Where a falling function of the logarithm of the noise is zero; NaN above the noise that is searched, and its
    lower end where less would do.

    Args:
      step: the first from the start, doubled until it is enclosed.
    """
    low, high, at = start, start, excess(start)
    if at > 0:
        while at > 0:
            low, high, step = high, high + step, 2 * step
            if high > math.log(saddlepoint.LARGEST_NOISE):
                return math.nan
            at = excess(high)
    else:
        while at <= 0:
            if low <= _LOWEST:
                return _LOWEST
            low, high, step = max(low - step, _LOWEST), low, 2 * step
            at = excess(low)
    return optimize.brentq(excess, low, high, xtol=precision)


@dataclasses.dataclass(frozen=True)
class Certified:
    """A noise multiplier that provably meets the budget, and the epsilon that it gives."""

    noise_multiplier: float
    epsilon: float


def certified(num_units: int, batch_size: float, steps: int, epsilon: float, delta: float, relation: str) -> Certified:
    """The smallest noise multiplier, to a few tenths of a percent, that meets a budget by the accountant. Where less
    noise would do than the least that is sensible, it is that one, with the epsilon that it gives.

    Formal guarantee: so many steps of DP-SGD with this noise, on Poisson batches without a cap of this expected size,
    are (epsilon, delta) differentially private under the relation. Tested by
    tests/experiments/planning_test.py::test_a_certified_noise_meets_its_budget_by_other_code.

    Raises:
      InputError: no noise of a sensible size meets the budget.
    """
    mechanism = dp_sgd(num_units, batch_size, None, 1.0, 1.0, steps, relation)

    def upper(log_sigma: float, interval: float) -> float:
        noisy = mechanism.replace(noise_multiplier=math.exp(log_sigma))
        return Accountant(noisy).upper(delta, interval=interval)

    def excess(log_sigma: float, interval: float) -> float:
        bound = upper(log_sigma, interval)
        return math.log(max(bound, 1e-9) / epsilon) if math.isfinite(bound) else 50.0

    guess, _ = saddlepoint.noise_multiplier(epsilon, delta, batch_size / num_units, steps)
    found, interval, step = math.log(guess) if math.isfinite(guess) else 0.0, _coarsest(epsilon), 0.05
    while True:
        before, found = found, _root(functools.partial(excess, interval=interval), found, step, _TOLERANCE)
        # On a finer grid the bound is lower, so that less noise will do: by a third of what the last one has gained.
        settled = not math.isfinite(found) or found == _LOWEST or (step < 0.05 and before - found < _TOLERANCE)
        if settled or interval / _FINER < _FINEST:
            break
        interval, step = interval / _FINER, 2 * _TOLERANCE
    while math.isfinite(found) and not upper(found, interval) <= epsilon:
        found += _TOLERANCE / 2
    if not math.isfinite(found):
        raise InputError(
            f"no noise reaches epsilon {epsilon:g} at delta {delta:g} with batches of {batch_size:g} in {steps} steps:"
            " raise epsilon or delta, or take fewer steps"
        )
    return Certified(saddlepoint.SMALLEST_NOISE if found == _LOWEST else math.exp(found), upper(found, interval))


def _cubic(x, lowest: int | None = None, highest: int | None = None):
    """First of four neighbouring nodes around each x, and the four weights of Lagrange's cubic through them."""
    first = np.floor(x).astype(int) - 1
    if lowest is not None:
        first = np.maximum(first, lowest)
    if highest is not None:
        first = np.minimum(first, highest - 3)
    s = x - first
    weights = (
        -(s - 1) * (s - 2) * (s - 3) / 6,
        s * (s - 2) * (s - 3) / 2,
        -s * (s - 1) * (s - 3) / 2,
        s * (s - 1) * (s - 2) / 6,
    )
    return first, weights


def _name(epsilon: float, delta: float, estimator: Callable) -> str:
    """Nodes of one estimator are none of another's."""
    content = json.dumps([_VERSION, SPACING, epsilon, delta, estimator.__name__])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read(path: pathlib.Path | None) -> dict[tuple[int, int], float]:
    stored = user_cache.read(path) if path else {}
    try:
        return {
            tuple(map(int, key.split(","))): math.nan if value is None else float(value)
            for key, value in stored.items()
        }
    except (ValueError, TypeError):
        return {}


def _write(path: pathlib.Path | None, nodes: dict[tuple[int, int], float]) -> None:
    """Keeps the nodes; a folder that cannot be written costs another computation, not the search."""
    if path is None:
        return
    # Another search may have kept nodes of its own meanwhile.
    merged = _read(path) | nodes
    with contextlib.suppress(OSError):
        user_cache.write(path, {f"{i},{j}": None if math.isnan(x) else x for (i, j), x in merged.items()})
