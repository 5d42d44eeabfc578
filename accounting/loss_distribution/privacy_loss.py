"""Privacy losses of one release, discretised so that they bound the true loss from above and from below.

A release is described by a dominating pair of distributions (P, Q) on the line; its loss at x is log(dP/dQ)(x), and
delta(epsilon) = P[E] - e^epsilon Q[E] maximised over events E. Both discretisations start from bins of x:

- pessimistic: the P and Q masses of a bin are split between the two grid losses around it so that both masses are kept
  ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380): the discrete pair dominates (P, Q);
- optimistic: neighbouring bins, split at random where needed, are merged into atoms whose losses lie on the grid.
  Merging and splitting are post-processing, so the discrete pair is dominated by (P, Q).
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy import special

_UNIT_ROUNDOFF = 2.0**-53
_LARGEST_EXPONENT = 50.0
_BINS_PER_INTERVAL = 4
_TABLE_SIZE = 2**16
_FARTHEST = 40.0  # standard deviations behind which a tail is zero in float64


@dataclasses.dataclass(frozen=True)
class GaussianMixturePair:
    """P = sum_i p_i N(m_i, sigma^2) against Q = sum_i q_i N(m_i, sigma^2), the missing weight of each at mean 0.

    The loss must increase with x; P's means must not be negative and Q's not positive.

    Attributes:
      sigma: common standard deviation.
      upper, lower: ((mean, weight), ...) of P and of Q, without the component at 0.
      upper_rest, lower_rest: weights of the component at 0 where 1 minus the others would lose them to rounding.
    """

    sigma: float
    upper: tuple[tuple[float, float], ...] = ()
    lower: tuple[tuple[float, float], ...] = ()
    upper_rest: float | None = None
    lower_rest: float | None = None

    def loss(self, x: Any) -> Any:
        """log(dP/dQ) at x."""
        return self._log_ratio(x, self.upper, self._rests[0]) - self._log_ratio(x, self.lower, self._rests[1])

    @property
    def _rests(self) -> tuple[float, float]:
        """Weights of the component at 0 in P and in Q."""
        given = ((self.upper, self.upper_rest), (self.lower, self.lower_rest))
        first, second = (
            max(0.0, 1 - math.fsum(w for _, w in components)) if rest is None else rest for components, rest in given
        )
        return first, second

    def _exponents(self, x: Any, components: Any) -> list[Any]:
        """log of (N(mean, sigma^2) / N(0, sigma^2)) for every component."""
        return [(2 * mean * x - mean**2) / (2 * self.sigma**2) for mean, _ in components]

    def rounding(self, x: np.ndarray, largest_loss: float) -> float:
        """Bound of the rounding error of `loss` at points x where it is at most `largest_loss` in size.

        Losses are sums of products with exponents of the components, and as accurate as these, relative to themselves.
        """
        size = 1.0
        for components in (self.upper, self.lower):
            for exponent, (_, weight) in zip(self._exponents(x, components), components, strict=True):
                size = max(size, 1 + float(np.abs(exponent).max(initial=0.0)) - math.log(weight))
        return 64 * _UNIT_ROUNDOFF * size * largest_loss

    def _log_ratio(self, x: Any, components: Any, rest: float) -> Any:
        """log of (mixture / N(0, sigma^2)), accurate near zero and free of overflow."""
        if not components:
            return np.zeros_like(x)
        exponents = self._exponents(x, components)
        near = sum(
            w * np.expm1(np.minimum(u, _LARGEST_EXPONENT)) for u, (_, w) in zip(exponents, components, strict=True)
        )
        far = np.full_like(x, math.log(rest) if rest > 0 else -np.inf)
        for u, (_, w) in zip(exponents, components, strict=True):
            far = np.logaddexp(far, u + math.log(w))
        largest = functools.reduce(np.maximum, exponents)
        return np.where((largest < _LARGEST_EXPONENT) & (near > -0.5), np.log1p(np.maximum(near, -0.5)), far)

    def _slope(self, x: Any) -> Any:
        """The derivative of the loss at x."""
        total = np.zeros_like(x)
        sides = ((self.upper, self._rests[0], 1), (self.lower, self._rests[1], -1))
        for components, rest, sign in sides:
            exponents = [(2 * mean * x - mean**2) / (2 * self.sigma**2) + math.log(w) for mean, w in components]
            if components:
                likelihoods = np.exp(
                    np.array([*exponents, np.full_like(x, math.log(rest) if rest > 0 else -np.inf)])
                    - functools.reduce(np.maximum, exponents, 0.0)
                )
                total += (
                    sign
                    * np.dot([mean / self.sigma**2 for mean, _ in components], likelihoods[:-1])
                    / likelihoods.sum(axis=0)
                )
        return total

    def inverse_loss(self, losses: Any) -> Any:
        """x with loss(x) = losses; -inf or inf where the loss never gets there. Accurate to rounding for one
        component."""
        if len(self.upper) + len(self.lower) == 1:
            (mean, weight), sign = ((*self.upper, *self.lower)[0], 1 if self.upper else -1)
            signed = sign * losses
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                near = np.log1p(np.maximum(np.expm1(signed) / weight, -1))
                far = signed - math.log(weight) + np.log1p(-(1 - weight) * np.exp(-signed))
            exponent = signed if weight == 1 else np.where(signed < 1, near, far)
            return (2 * self.sigma**2 * exponent + mean**2) / (2 * mean)
        reach = self.sigma * 45 + max(abs(m) for m, _ in self.upper + self.lower)
        table_x = np.linspace(-reach, reach, _TABLE_SIZE)
        table = self.loss(table_x)
        cell = np.clip(np.searchsorted(table, losses), 1, _TABLE_SIZE - 1)
        low, high = table_x[cell - 1], table_x[cell]
        x = (low + high) / 2
        for _ in range(6):  # Newton, kept inside the cell; what is left is measured by `pessimistic` and charged
            slope = self._slope(x)
            step = np.divide(self.loss(x) - losses, slope, out=np.zeros_like(x), where=slope > 0)
            x = np.clip(x - step, low, high)
        return np.where(losses <= table[0], -np.inf, np.where(losses >= table[-1], np.inf, x))

    def interval_masses(self, edges: Any) -> "_Masses":
        """Masses of the intervals between ascending edges."""
        z = edges / self.sigma
        at_zero, error = _normal_intervals(z)
        difference, difference_error = np.zeros_like(at_zero), np.zeros_like(at_zero)
        sides: list[Any] = []
        for components, rest, sign in ((self.upper, self._rests[0], 1), (self.lower, self._rests[1], -1)):
            side = rest * at_zero
            for mean, weight in components:
                shifted, shifted_error = _normal_intervals(z, mean / self.sigma)
                change, change_error = _change(z, mean / self.sigma, at_zero, error, shifted, shifted_error)
                side = side + weight * shifted
                difference += sign * weight * change
                difference_error += weight * change_error
                error = np.maximum(error, shifted_error)
            sides.append(side)
        upper, lower = sides
        return _Masses(upper, lower, difference, error, difference_error)

    def tail_quantiles(self, mass: float) -> tuple[Any, Any]:
        """(x_low, x_high) outside which P has at most `mass` on either side."""
        means = [0.0] + [m for m, _ in self.upper]
        reach = -self.sigma * special.ndtri(mass)
        return min(means) - reach, max(means) + reach


@dataclasses.dataclass(frozen=True)
class _Masses:
    """P and Q masses of intervals.

    Attributes:
      p, q: the masses, each a sum of positive terms.
      difference: p - q, computed without subtracting the two.
      error: bound of the relative rounding error of p and of q.
      difference_error: bound of the absolute rounding error of the difference.
    """

    p: np.ndarray
    q: np.ndarray
    difference: np.ndarray
    error: np.ndarray
    difference_error: np.ndarray


def _normal_intervals(edges: Any, shift: float = 0.0) -> tuple[Any, Any]:
    """N(shift, 1) masses between ascending edges, and their relative rounding errors.

    Wide intervals are differences of tails, taken from the nearer one. A tail at z is exp(-z^2 / 2) times something
    smooth, so rounding costs a multiple of z^2; 4 covers what scipy loses, with room. Narrow intervals are a density
    times a width, by Taylor's series: a difference of tails would lose the digits that both have in common.
    """
    z = edges - shift
    left, right = special.ndtr(z), special.ndtr(-z)
    with np.errstate(invalid="ignore"):  # the whole line has no nearer tail
        upper_half = z[:-1] + z[1:] > 0
    mass = np.where(upper_half, right[:-1] - right[1:], left[1:] - left[:-1])
    size = np.where(upper_half, right[:-1], left[1:])
    near = np.minimum(np.abs(np.where(upper_half, z[:-1], z[1:])), _FARTHEST)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(mass > 0, (16 + 4 * near**2) * _UNIT_ROUNDOFF * size / mass, 0.0)
    middle, width, narrow = _narrow(edges, shift)
    series = width * np.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi) * _widening(middle, width)
    mass = np.where(narrow, series, np.maximum(mass, 0.0))
    return mass, np.where(narrow, (16 + 4 * (np.abs(middle) + abs(shift)) ** 2) * _UNIT_ROUNDOFF, error)


def _narrow(edges: Any, shift: float) -> tuple[Any, Any, Any]:
    """(middle, width, whether the series holds to rounding) of the intervals between edges, seen from a shift."""
    with np.errstate(invalid="ignore"):
        middle, width = (edges[:-1] + edges[1:]) / 2 - shift, edges[1:] - edges[:-1]
        # The next term of the series, ((|middle| + 3) width / 2)^8 / 9!, is then below 2^-53.
        narrow = (width * (np.abs(middle) + abs(shift) + 3) <= 0.1) & (np.abs(middle) < _FARTHEST - 4)
    return np.where(narrow, middle, 0.0), np.where(narrow, width, 0.0), narrow


def _widening(middle: Any, width: Any) -> Any:
    """Mass of an interval of the normal law divided by its width and the density in its middle: with h the half width,
    1 + He_2 h^2 / 3! + He_4 h^4 / 5! + He_6 h^6 / 7!.
    """
    m, h = middle**2, (width / 2) ** 2
    return 1 + h * ((m - 1) / 6 + h * ((m**2 - 6 * m + 3) / 120 + h * (m**3 - 15 * m**2 + 45 * m - 15) / 5040))


def _change(z: Any, shift: float, at_zero: Any, error: Any, shifted: Any, shifted_error: Any) -> tuple[Any, Any]:
    """N(shift, 1) minus N(0, 1) masses of the intervals between z, and a bound of its rounding error: for narrow
    intervals by the likelihood ratio in the middle, which keeps the digits of a small difference.
    """
    middle, width, narrow = _narrow(z, 0.0)
    narrow &= _narrow(z, shift)[2]
    exponent = np.where(narrow, shift * middle - shift**2 / 2, 0.0)
    growth = np.expm1(exponent)
    # The widenings differ by about shift * middle * width^2 / 12.
    bend = _widening(middle - shift, width) / _widening(middle, width) - 1
    change = at_zero * (growth + (1 + growth) * bend)
    doubt = at_zero * (np.abs(growth) * error + (1 + growth) * (8 * np.abs(exponent) + width**2) * _UNIT_ROUNDOFF * 8)
    return (
        np.where(narrow, change, shifted - at_zero),
        np.where(narrow, doubt, shifted * shifted_error + at_zero * error),
    )


@dataclasses.dataclass(frozen=True)
class DiscreteLoss:
    """P masses of losses offset + interval * (first + i), i = 0, 1, ...

    Attributes:
      infinity: P mass of an infinite loss.
      shift: how far rounding may have moved any loss, against the claimed direction.
      mass_error: bound of the relative error of each mass.
    """

    probabilities: np.ndarray
    first: int
    interval: float
    offset: float
    infinity: float
    shift: float
    mass_error: np.ndarray

    @property
    def losses(self) -> Any:
        return self.offset + self.interval * (self.first + np.arange(self.probabilities.size))


def _grid(pair: GaussianMixturePair, interval: float, tail_mass: float) -> tuple[int, int]:
    """First and last multiple of the interval that enclose the losses of all but `tail_mass` of P on either side."""
    low, high = (float(pair.loss(np.array(x))) for x in pair.tail_quantiles(tail_mass))
    return math.floor(low / interval), math.ceil(high / interval)


def spread(pair: GaussianMixturePair, tail_mass: float) -> float:
    """Distance between the losses that enclose all but `tail_mass` of P on either side."""
    low, high = (float(pair.loss(np.array(x))) for x in pair.tail_quantiles(tail_mass))
    return high - low


def grid_size(pair: GaussianMixturePair, interval: float, tail_mass: float) -> int:
    """How many grid points a discretisation needs."""
    first, last = _grid(pair, interval, tail_mass)
    return last - first + 1


def pessimistic(pair: GaussianMixturePair, interval: float, tail_mass: float) -> DiscreteLoss:
    """A discrete loss that dominates the pair's."""
    first, last = _grid(pair, interval, tail_mass)
    grid = interval * np.arange(first, last + 1)
    edges = pair.inverse_loss(grid)
    finite = np.isfinite(edges)
    residual = np.abs(pair.loss(edges[finite]) - grid[finite]).max(initial=0.0)
    m, g = pair.interval_masses(edges), grid[:-1]
    # The upper end's share b solves (p - b) e^-g + b e^-(g + interval) = q. Near zero the difference p - q is the
    # accurate form. Rounding is decided towards the upper end.
    near, decay, growth = np.abs(g) < 1, np.expm1(-np.clip(g, -1, 1)), np.exp(np.clip(g, -1, 1))
    excess = np.where(near, (m.p * decay + m.difference) * growth, m.p - _scaled(m.q, g))
    doubt = np.where(near, (m.p * np.abs(decay) * m.error + m.difference_error) * growth, 2 * m.p * m.error)
    upper_share = np.clip((excess + doubt) / -math.expm1(-interval), 0.0, m.p)
    masses = np.append(m.p - upper_share, 0.0)
    masses[1:] += upper_share
    below, _, beyond = pair.interval_masses(np.array([-np.inf, edges[0], edges[-1], np.inf])).p
    masses[0] += below
    rounding = pair.rounding(edges[finite], float(np.abs(grid).max()))
    return DiscreteLoss(
        masses, first, interval, 0.0, float(beyond), residual + rounding, np.append(m.error, m.error[-1])
    )


def _scaled(q: Any, g: Any) -> Any:
    """q e^g without overflow where q is zero."""
    return np.exp(np.log(q, out=np.full_like(q, -np.inf), where=q > 0) + g)


def optimistic(pair: GaussianMixturePair, interval: float, tail_mass: float) -> DiscreteLoss:
    """A discrete loss that is dominated by the pair's."""
    first, last = _grid(pair, interval, tail_mass)
    # Any bins will do; a few per interval leave the merging below enough choice.
    fine = interval * np.arange(first, last, 1 / _BINS_PER_INTERVAL)
    edges = np.concatenate([[-np.inf], pair.inverse_loss(fine), [np.inf]])
    m = pair.interval_masses(edges)
    keep = (m.p > 0) & (m.q > 0)
    masses, offset = _merge(m.p[keep].tolist(), m.q[keep].tolist(), m.difference[keep].tolist(), interval)
    # The loss of an atom is as accurate as its masses, and where it is small as their difference.
    p, error = m.p[keep], m.error[keep]
    losses = np.abs(np.log(p) - np.log(m.q[keep]))
    doubt = np.where(losses < 0.5, m.difference_error[keep] / p + losses * error, 2 * error)
    inner = edges[np.isfinite(edges)]
    shift = pair.rounding(inner, interval * max(abs(first), abs(last))) + 4 * float(doubt.max())
    return DiscreteLoss(masses, 0, interval, offset, 0.0, shift, np.full(masses.size, float(error.max())))


def _merge(p: list[float], q: list[float], difference: list[float], interval: float) -> tuple[np.ndarray, float]:
    """Merges neighbouring atoms, ordered by loss, into atoms whose losses lie on a grid.

    Walking upwards, an atom that would lift the group's loss above its grid point is split: part of it completes the
    group, the rest begins the next. A last group that stays short goes to the grid point below it.

    Args:
      p, q, difference: P mass, Q mass and p - q of each atom.

    Returns:
      Masses on the grid and the loss of its first point, which is the loss of the first group, an interval wide.
    """

    def loss_of(p: Any, q: Any, difference: Any) -> Any:
        return -math.log1p(-difference / p) if abs(difference) < 0.5 * p else math.log(p / q)

    lowest = loss_of(p[0], q[0], difference[0])
    group_p = group_q = group_difference = 0.0
    index = 0
    while index < len(p) and (index == 0 or loss_of(p[index], q[index], difference[index]) < lowest + interval):
        group_p, group_q, group_difference = (
            group_p + p[index],
            group_q + q[index],
            group_difference + difference[index],
        )
        index += 1
    offset = loss_of(group_p, group_q, group_difference)
    masses = {0: group_p}
    point, group_p, group_q = 1, 0.0, 0.0
    target = offset + interval
    excess = 0.0  # P mass - e^target Q mass of the group so far
    for i in range(index, len(p)):
        rest = 1.0
        while True:
            own = _excess(p[i], q[i], difference[i], target)
            if excess + rest * own < 0 or own <= 0:
                excess += rest * own
                group_p, group_q = group_p + rest * p[i], group_q + rest * q[i]
                break
            share = min(rest, -excess / own)
            masses[point] = masses.get(point, 0.0) + group_p + share * p[i]
            rest -= share
            group_p = group_q = excess = 0.0
            point = max(point + 1, math.ceil((loss_of(p[i], q[i], difference[i]) - offset) / interval))
            target = offset + interval * point
    if group_p > 0:
        point = math.floor((math.log(group_p / group_q) - offset) / interval) if group_q > 0 else point
        masses[max(point, 0)] = masses.get(max(point, 0), 0.0) + group_p
    result = np.zeros(max(masses) + 1)
    result[list(masses)] = list(masses.values())
    return result, offset


def _excess(p: float, q: float, difference: float, loss: float) -> float:
    """p - e^loss q; near zero by the difference p - q, elsewhere without forming a large power."""
    if abs(loss) < 1:
        return math.exp(loss) * difference - math.expm1(loss) * p
    return -p * math.expm1(loss + math.log(q / p)) if q > p * 1e-300 else p


def mixture(first: DiscreteLoss, second: DiscreteLoss, weight: float) -> DiscreteLoss:
    """The loss that is `second` with probability `weight`, known to the observer, and `first` otherwise; both on one
    grid.
    """
    start = min(first.first, second.first)
    end = max(loss.first + loss.probabilities.size for loss in (first, second))
    masses, error = np.zeros(end - start), np.zeros(end - start)
    for loss, share in ((first, 1 - weight), (second, weight)):
        window = slice(loss.first - start, loss.first - start + loss.probabilities.size)
        masses[window] += share * loss.probabilities
        error[window] += share * loss.probabilities * loss.mass_error
    error = np.divide(error, masses, out=np.zeros_like(error), where=masses > 0)
    infinity = (1 - weight) * first.infinity + weight * second.infinity
    return DiscreteLoss(masses, start, first.interval, first.offset, infinity, max(first.shift, second.shift), error)


def cut_tail(loss: DiscreteLoss, mass: float) -> DiscreteLoss:
    """Makes the largest losses, of `mass` together at most, infinite: rare enormous losses would spoil the tilt for all
    others.
    """
    beyond = np.cumsum(loss.probabilities[::-1])[::-1]
    keep = max(1, int(np.count_nonzero(beyond > mass)))
    cut = float(beyond[keep]) if keep < beyond.size else 0.0
    return dataclasses.replace(
        loss, probabilities=loss.probabilities[:keep], mass_error=loss.mass_error[:keep], infinity=loss.infinity + cut
    )
