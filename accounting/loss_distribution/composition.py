"""delta(epsilon) of many releases, from their discrete losses, with every source of numerical error bounded.

A plain FFT leaves an error near 1e-16 times the number of steps in every probability, which is not small beside a delta
of 1e-10. Here each loss is first tilted, p(l) e^(theta l) / M(theta), so that the composed loss is centred where
epsilon lies and the error is relative to delta (exponential tilting, as in the saddle-point accountant of Alghamdi et
al. 2022, arXiv 2208.09595). With K = log M, summed over all steps, and w(x) = (1 - e^-x) e^(-theta x) for x > 0:

    delta(epsilon) = P[L = inf] + e^(K - theta epsilon) sum over l > epsilon of P_theta[L = l] w(l - epsilon)

and an error of the tilted distribution in L2 norm changes the sum by at most that norm times |w|_2.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import fft, special

from accounting.loss_distribution import blocks
from accounting.loss_distribution.privacy_loss import DiscreteLoss

_UNIT_ROUNDOFF = 2.0**-53
# Numbers in which to transform: wider ones only where round-off would show, and only where the machine has them.
_PRECISIONS = (np.float64, np.longdouble) if np.finfo(np.longdouble).eps < 2.0**-60 else (np.float64,)
_NEGLIGIBLE_SLACK, _TOLERABLE_SLACK = 1e-3, 1e-2
# Tilted mass outside the window of the transform; it wraps around and is charged in full.
_LOG_OUTSIDE = 40.0
_TILTS = 8
# Windows are bounded by Chernoff at these distances from theta, in units of the tilted loss's inverse standard
# deviation.
_WINDOW_TILTS = (0.02, 0.1, 0.4, 1, 2, 5, 9)
_PROFILE_TILTS, _SMALLEST_PROFILE_TILT = 5, 0.1
_LARGEST_TRANSFORM = 2**22
# From so many releases on they are composed in blocks.
_LONG = 2**27
_SMALLEST_TILT, _LARGEST_TILT = 1e-4, 1e6
_LARGEST_EXPONENT = 500.0


@dataclasses.dataclass(frozen=True)
class _Tilted:
    """The composed, tilted loss on a window, at one theta.

    Attributes:
      theta: the tilt.
      log_moment: K(theta), summed over all releases.
      centre: mean of the tilted loss.
      start, interval: loss of the first bin and distance between bins.
      probabilities: tilted masses of the bins.
      error: bound of the L2 error of `probabilities`.
      relative_error: bound of the relative error of e^K.
      outside: bound of the tilted mass outside the window.
    """

    theta: float
    log_moment: float
    centre: float
    start: float
    interval: float
    probabilities: np.ndarray
    error: float
    relative_error: float
    outside: float


class Composition:
    """The composition of groups of releases, each a discrete loss repeated `count` times, on one grid.

    Args:
      groups: pairs (loss, count) with equal intervals.
      pessimistic: whether the losses bound the true ones from above; then so do the results, else from below.
      log_outside: minus the logarithm of the tilted mass that may lie outside of a window.
    """

    def __init__(
        self, groups: Sequence[tuple[DiscreteLoss, int]], *, pessimistic: bool, log_outside: float = _LOG_OUTSIDE
    ) -> None:
        self._log_outside = log_outside
        self._groups = [(loss, count) for loss, count in groups if count > 0]
        self._pessimistic = pessimistic
        self._shift = sum(count * loss.shift for loss, count in self._groups)
        self._interval = self._groups[0][0].interval
        self._parts = []
        for loss, count in self._groups:
            used = loss.probabilities > 0
            # The masses are bounds themselves, whatever they are weighed with afterwards.
            doubt = np.log1p(loss.mass_error[used] if pessimistic else -np.minimum(loss.mass_error[used], 0.5))
            self._parts.append((loss, count, np.log(loss.probabilities[used]) + doubt, loss.losses[used]))
        log_finite = sum(count * math.log1p(-loss.infinity) for loss, count in self._groups)
        self._infinite = -math.expm1(log_finite) if pessimistic else 0.0

    def epsilon(self, delta: float, hint: float | None = None) -> float:
        """An upper (pessimistic) or lower (optimistic) bound of the smallest epsilon with delta(epsilon) <= delta.

        Args:
          hint: where epsilon is expected; a good one saves time and memory, a bad one does no harm.
        """
        target = delta - self._infinite
        if target <= 0:
            return math.inf
        theta, chernoff = self._chernoff(target)
        if self._is_long:
            in_blocks = self._in_blocks(theta)
            if in_blocks is None:
                return math.inf if self._pessimistic else 0.0
            return in_blocks.epsilon(delta, hint)
        if hint is not None and 0 < hint < chernoff:
            theta = self._tilt_centred_at(hint, theta)
        tighter, bound = (min, chernoff) if self._pessimistic else (max, 0.0)
        precision, centred = 0, False
        # Every tilt gives a valid bound; the tightest centres the composed loss at epsilon itself.
        for _ in range(_TILTS):
            found, slack = self._solve(self._tilted(theta, _PRECISIONS[precision]), target)
            previous, bound = bound, tighter(bound, found)
            if slack <= _NEGLIGIBLE_SLACK or (
                slack <= _TOLERABLE_SLACK and centred and abs(bound - previous) <= 1e-6 * abs(bound)
            ):
                break
            if not math.isfinite(
                slack
            ):  # epsilon lies outside the window: rare, enormous losses dominate less at a smaller tilt
                theta *= 0.7
                continue
            if slack > _TOLERABLE_SLACK and centred and precision + 1 < len(_PRECISIONS):
                precision += 1
            theta, centred = self._tilt_centred_at(bound, theta), True
        return float(max(0.0, bound + self._shift if self._pessimistic else bound - self._shift))

    def deltas(self, epsilons: Sequence[float] | np.ndarray) -> np.ndarray:
        """Upper bounds of delta at each of the ascending `epsilons` >= 0, for a pessimistic composition.

        A tilt gives a bound at every epsilon, tight near its centre; a few centres serve all.
        """
        if self._is_long:
            middle = float(np.median(np.asarray(epsilons, dtype=float)))
            in_blocks = self._in_blocks(self._tilt_centred_at(max(middle, self._interval), 1.0))
            return np.ones(np.size(epsilons)) if in_blocks is None else in_blocks.deltas(epsilons)
        targets = np.asarray(epsilons, dtype=float) - self._shift
        best = np.full(targets.size, 1 - self._infinite)
        theta = 1.0
        for centre in targets[:: max(1, targets.size // _PROFILE_TILTS)]:
            theta = max(self._tilt_centred_at(max(centre, self._interval), theta), _SMALLEST_PROFILE_TILT)
            for tilt in _falling(theta):
                tilted = self._tilted(tilt)
                if tilted is not None:
                    best = np.minimum(best, self._deltas_at(tilted, targets))
                    break
        return np.minimum(best + self._infinite, 1.0)

    @property
    def _is_long(self) -> bool:
        """Whether releases are to be composed in blocks."""
        return len(self._groups) == 1 and self._groups[0][1] >= _LONG

    def _in_blocks(self, theta: float) -> "Composition | None":
        """A composition of larger and fewer releases that bounds this one, best near a tilt; None where a block would
        be too large to transform.
        """
        (loss, count) = self._groups[0]
        releases = math.isqrt(count)
        # Further releases only add to the upper bound, fewer only take from the lower one.
        number = -(-count // releases) if self._pessimistic else count // releases
        inner = Composition([(loss, releases)], pessimistic=self._pessimistic, log_outside=blocks.LOG_OUTSIDE)
        tilted = inner._tilted(theta, _PRECISIONS[-1])
        if tilted is None:
            return None
        interval = math.sqrt(inner._cumulant(theta)[2]) / blocks.POINTS_PER_DEVIATION
        found = blocks.block(tilted, releases, loss, interval, pessimistic=self._pessimistic)
        return Composition([(found, number)], pessimistic=self._pessimistic)

    def _cumulant(self, theta: float) -> tuple[float, float, float]:
        """K(theta) = sum over releases of log E[e^(theta L)] under P, finite losses only, and its two derivatives."""
        total, mean, variance = 0.0, 0.0, 0.0
        for _, count, logs, losses in self._parts:
            exponents = logs + theta * losses
            largest = exponents.max()
            weights = np.exp(exponents - largest)
            mass = weights.sum()
            first = weights @ losses / mass
            total += count * (largest + math.log(mass))
            mean += count * first
            variance += count * (weights @ (losses - first) ** 2) / mass
        return float(total), float(mean), float(max(variance, self._interval**2))

    def _chernoff(self, delta: float) -> tuple[float, float]:
        """The theta of the tightest Chernoff bound, delta <= e^(K(theta) - theta epsilon), and that epsilon.

        At the best theta, theta K' - K = log(1 / delta); the left side grows with theta at the rate theta K''.
        """
        log_inverse = -math.log(delta)
        theta = self._newton(
            math.sqrt(2 * log_inverse / self._cumulant(0.0)[2]), lambda t, k, m, v: (t * m - k - log_inverse, t * v)
        )
        rounding = sum(count * self._rounding(theta, losses) for _, count, _, losses in self._parts)
        return theta, (self._cumulant(theta)[0] + log_inverse + rounding) / theta

    def _rounding(self, theta: float, losses: np.ndarray) -> float:
        """Bound of the relative error of one release's moment, and of its tilted masses, in float64."""
        return float(64 + theta * np.abs(losses).max()) * _UNIT_ROUNDOFF

    def _tilt_centred_at(self, epsilon: float, start: float) -> float:
        """theta with K'(theta) = epsilon: the mean of the tilted loss lies at epsilon."""
        return self._newton(start, lambda t, k, m, v: (m - epsilon, v))

    def _newton(self, theta: float, equation: Any) -> float:
        """A root of a growing function of theta, roughly: any theta is valid, a good one is only tighter."""
        low, high = _SMALLEST_TILT, _LARGEST_TILT
        theta = min(max(theta, low), high)
        for _ in range(40):
            value, slope = equation(theta, *self._cumulant(theta))
            low, high = (theta, high) if value < 0 else (low, theta)
            step = theta - value / slope
            # Outside the bracket, or far off, halve the logarithmic distance instead.
            previous, theta = theta, step if low < step < high else math.sqrt(low * high)
            if abs(theta - previous) <= 1e-2 * previous:
                break
        return theta

    def _window(self, theta: float, log_moment: float, variance: float) -> tuple[float, float]:
        """Losses (low, high) outside which the tilted composition has at most 2 e^-log_outside, by Chernoff's bound."""
        tilts = [t / math.sqrt(variance) for t in _WINDOW_TILTS]
        high = min((self._cumulant(theta + s)[0] - log_moment + self._log_outside) / s for s in tilts)
        low = max((log_moment - self._cumulant(theta - s)[0] - self._log_outside) / s for s in tilts)
        return low, high

    def _tilted(self, theta: float, precision: type = np.float64) -> _Tilted | None:
        """The composed loss at one tilt; None where its window would be too large to transform."""
        log_moment, centre, variance = self._cumulant(theta)
        interval = self._interval
        low, high = self._window(theta, log_moment, variance)
        offset = sum(count * loss.offset for loss, count in self._groups)
        first = math.floor((low - offset) / interval)
        if high - low > interval * _LARGEST_TRANSFORM:
            return None
        size = fft.next_fast_len(math.ceil((high - low) / interval) + 2, real=True)
        unit = float(np.finfo(precision).eps) / 2
        transform_error = 7 * unit * math.log2(max(size, 2))  # Higham 2002, theorem 24.2

        product: Any = 1.0
        shift, error, relative_error = 0, 0.0, 0.0
        for loss, count, logs, losses in self._parts:
            exponents = logs + theta * losses
            tilted = np.exp(exponents - special.logsumexp(exponents))
            # Wrapping a loss around the window keeps sums exact modulo the window's length.
            bins = np.flatnonzero(loss.probabilities) % size
            wrapped = np.bincount(bins, weights=tilted, minlength=size)
            product = product * fft.rfft(wrapped.astype(precision)) ** count
            shift += count * loss.first
            # No number of a transform is larger than 1 in size, or off by more than `one` in this norm: so the power
            # of `count` of them is off by count times that, times what rounding may have made the others grow.
            one = transform_error * float(np.linalg.norm(wrapped))
            error += count * one * math.exp(min(count * one * math.sqrt(size), 700.0))
            # The masses are rounded to float64 before they are transformed: an error relative to each.
            relative_error += count * self._rounding(theta, losses)
        probabilities = np.roll(fft.irfft(product, size), shift - first)
        # `**` multiplies count - 1 times, by repeated squaring or through logarithms; four roundings are allowed for
        # each factor.
        powers = sum(count for _, count in self._groups) * 4 * unit
        error += (powers + transform_error) * float(np.linalg.norm(probabilities))
        start = offset + interval * first
        outside = 2 * math.exp(-self._log_outside)
        probabilities = probabilities.astype(np.float64)
        return _Tilted(
            theta, log_moment, centre, start, interval, probabilities, error, math.expm1(relative_error), outside
        )

    def _log_deltas(self, t: _Tilted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bins x, relative to the centre of the tilt; a bound of log delta at each; the share in it that numerical
        error may have.

        Further from the centre the weights leave the range of float64.
        """
        x = t.start - t.centre + t.interval * np.arange(t.probabilities.size)
        inside = np.abs(x) * (t.theta + 1) < _LARGEST_EXPONENT
        x, p = x[inside], np.maximum(t.probabilities[inside], 0.0)
        if not x.size:
            return x, x, x

        decay = np.exp(-t.theta * x)
        value = _excess_beyond(p * decay, t.interval)
        slack = self._slack(t, x) * decay
        relative_error = t.relative_error + 8 * x.size * _UNIT_ROUNDOFF  # of so many additions of positive numbers
        if self._pessimistic:
            bound = value * (1 + relative_error) + slack + math.exp(-_LARGEST_EXPONENT * t.theta / (t.theta + 1))
        else:
            bound = value * (1 - min(relative_error, 1.0)) - slack
        with np.errstate(divide="ignore", invalid="ignore"):
            return x, t.log_moment - t.theta * t.centre + np.log(np.maximum(bound, 0.0)), slack / np.maximum(value, 0.0)

    def _deltas_at(self, t: _Tilted, epsilons: np.ndarray) -> np.ndarray:
        """Upper bounds of the finite losses' share of delta; 1 below the window."""
        x, log_delta, _ = self._log_deltas(t)
        if not x.size:
            return np.ones_like(epsilons)
        place = np.floor((epsilons - t.centre - x[0]) / t.interval).astype(int)
        left, right = (np.clip(i, 0, x.size - 1) for i in (place, place + 1))
        # Between two bins delta is convex in e^epsilon, so the chord between the two bounds lies above it; beyond the
        # last it only falls.
        with np.errstate(over="ignore"):  # far beyond the last bin
            share = np.clip(np.expm1(epsilons - t.centre - x[left]) / math.expm1(t.interval), 0.0, 1.0)
        high, low = (np.exp(np.minimum(log_delta[i], 0.0)) for i in (left, right))
        return np.where(place >= 0, high + (low - high) * share, 1.0)

    def _solve(self, t: _Tilted | None, delta: float) -> tuple[float, float]:
        """The epsilon in the window where the bound of delta crosses its target, and the share of numerical error in
        delta there.

        inf or -inf where it does not cross, which is trivially a bound.
        """
        nothing = (math.inf, math.inf) if self._pessimistic else (-math.inf, math.inf)
        if t is None:
            return nothing
        x, log_delta, slack = self._log_deltas(t)
        if not x.size:
            return nothing
        above = np.flatnonzero(log_delta > math.log(delta))
        if not self._pessimistic:
            return (t.centre + x[above[-1]], slack[above[-1]]) if above.size else nothing
        last = above[-1] if above.size else -1
        if last == x.size - 1:
            return nothing
        if last < 0:
            return t.centre + x[0], math.inf
        high, low = np.exp(log_delta[last : last + 2])
        share = (high - delta) / (high - low) if math.isfinite(high) else 1.0
        return t.centre + x[last] + math.log1p(math.expm1(t.interval) * share), slack[last]

    def _slack(self, t: _Tilted, x: Any) -> float:
        """Bound of the error of the sum in the module's formula: transform round-off through |w|_2, wrapped mass
        through max w.
        """
        distance = x - x[0]
        w = -np.expm1(-distance) * np.exp(-t.theta * distance)
        return t.error * float(np.linalg.norm(w)) + t.outside


def _excess_beyond(masses: np.ndarray, interval: float) -> Any:
    """For every grid loss x, the sum over larger losses l of mass (1 - e^(x - l)).

    From x to the next smaller one, 1 - e^(x - l) becomes e^-interval times itself plus 1 - e^-interval: a recurrence of
    positive terms, in which nothing cancels.
    """
    beyond = np.cumsum(masses[::-1])
    fed = -math.expm1(-interval) * np.concatenate([[0.0], beyond[:-1]])
    from scipy import signal  # its import takes longer than all others together

    return signal.lfilter([1.0], [1.0, -math.exp(-interval)], fed)[::-1]


def _falling(theta: float) -> Iterator[float]:
    """theta and smaller tilts, for where a window is too large."""
    for _ in range(_TILTS):
        yield theta
        theta *= 0.7
