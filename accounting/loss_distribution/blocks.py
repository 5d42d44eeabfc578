"""Many releases as fewer, larger ones: for counts beyond about 1e8, where a grid that is fine enough for one release
has too many points for all of them.

A block is the composition of some releases on a coarser grid. Its masses come from the tilted composition, at the tilt
at which they will be needed, each with the bound of its error; they are then moved to the coarser grid so that the
result bounds the block from above (both masses of an atom are kept while it is split between two grid points) or from
below (atoms are merged, which is post-processing), as with the losses of one release (loss_distribution.privacy_loss).
"""

import math
from typing import Any

import numpy as np

from accounting.loss_distribution.privacy_loss import DiscreteLoss

# Grid points of a block within one standard deviation of its loss: moving to them costs about (1 / 64)^2 / 6 of the
# variance.
POINTS_PER_DEVIATION = 64
# Of the tilted mass, e^-this may lie outside of a block's window.
LOG_OUTSIDE = 60.0
# What rounding may do to a grid loss while sums of some thousand terms are formed, in intervals.
_ROUNDING = 1e-11


def upper(losses: np.ndarray, masses: np.ndarray, interval: float) -> tuple[int, np.ndarray]:
    """Splits every atom between the two grid points around it so that its mass under both distributions is kept.

    Args:
      losses, masses: P masses of ascending losses.

    Returns:
      (number of the first grid point, masses at grid points).
    """
    place = np.floor(losses / interval).astype(np.int64)
    first = int(place[0])
    share = np.clip(np.expm1(place * interval - losses) / math.expm1(-interval), 0.0, 1.0)
    size = int(place[-1]) - first + 2
    result = np.bincount(place - first, weights=masses * (1 - share), minlength=size)
    result += np.bincount(place - first + 1, weights=masses * share, minlength=size)
    return first, result


def lower(losses: np.ndarray, masses: np.ndarray, interval: float) -> tuple[int, np.ndarray]:
    """Merges neighbouring atoms so that each group's loss is a grid point; an atom between two groups is split.

    Args:
      losses, masses: P masses of ascending, evenly spaced losses.

    Returns:
      (number of the first grid point, masses at grid points).
    """
    points: dict[int, float] = {}
    window = 4 * math.ceil(interval / (losses[1] - losses[0]))
    index, rest = 0, 1.0
    while index < losses.size:
        point = math.floor(losses[index] / interval) + 1
        end = index + window
        while True:
            p = masses[index:end].copy()
            p[0] *= rest
            # P mass - e^point Q mass: negative below the point, positive above.
            excess = np.cumsum(p * -np.expm1(point * interval - losses[index:end]))
            full = np.flatnonzero(excess >= 0)
            full = full[full > 0]
            if full.size or end >= losses.size:
                break
            end += 4 * window
        if not full.size:  # what is left stays short of the point: it goes to the one below its own loss
            q = p * np.exp(-losses[index:])
            total = p.sum()
            if total > 0:
                point = math.floor(math.log(total / q.sum()) / interval)
                points[point] = points.get(point, 0.0) + float(total)
            break
        last = int(full[0])
        own = excess[last] - excess[last - 1]
        taken = float(-excess[last - 1] / own) if own > 0 else 1.0
        points[point] = points.get(point, 0.0) + float(p[:last].sum() + taken * p[last])
        index, rest = index + last, 1 - taken
    first = min(points)
    result = np.zeros(max(points) - first + 1)
    result[[point - first for point in points]] = list(points.values())
    return first, result


def block(tilted: Any, releases: int, loss: DiscreteLoss, interval: float, *, pessimistic: bool) -> DiscreteLoss:
    """One loss that bounds that of so many releases.

    Args:
      tilted: their composition at one tilt, as loss_distribution.composition has it.
      loss: of one release.
      interval: of the block's grid.
    """
    losses = tilted.start + tilted.interval * np.arange(tilted.probabilities.size)
    sign = 1.0 if pessimistic else -1.0
    doubt = tilted.error + (0.0 if pessimistic else tilted.outside)
    probabilities = np.maximum(tilted.probabilities + sign * doubt, 0.0)
    masses = probabilities * np.exp(tilted.log_moment - tilted.theta * losses)
    first, merged = (upper if pessimistic else lower)(losses, masses, interval)
    outside = tilted.outside * math.exp(tilted.log_moment - tilted.theta * float(losses[0]))
    infinity = -math.expm1(releases * math.log1p(-loss.infinity)) + outside if pessimistic else 0.0
    shift = releases * loss.shift + _ROUNDING * interval
    error = np.full(merged.size, tilted.relative_error + 1e-13)
    return DiscreteLoss(merged, first, interval, 0.0, infinity, shift, error)
