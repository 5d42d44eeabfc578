"""How far a law can be trusted: errors on what it was not fitted to, and intervals by resampling the runs.

Every kind of error belongs to one way of going beyond the data: a size or a noise level between two that were measured,
a larger model, a longer run, more noise. A prediction is given with the error of the ways that it goes, which grows
with the distance: laws of the smaller models predict all larger ones, laws of the first steps all later ones, and the
90 % quantile of their errors is a line in the logarithm of how far beyond their data that is.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import optimize, sparse

from experiments.laws.law import Law
from experiments.laws.points import Points
from experiments.sweep.results import LEARNING_RATE, PARAMETERS, RATIO, Table

# Numbers of steps that a law needs.
_FEWEST_STEPS = 6

BETWEEN, LARGER, LONGER, NOISIER = "between", "larger model", "longer run", "more noise"


@dataclasses.dataclass(frozen=True)
class Error:
    """Relative errors of predictions of points that were left out.

    Attributes:
      median, ninety: the median and the 90 % quantile.
      count: of points.
      at_edge, growth: the line of the 90 % quantile: its value at the edge of the data, and what each factor of e
        beyond adds.
    """

    median: float
    ninety: float
    count: int
    at_edge: float
    growth: float = 0.0

    def at(self, distance: float) -> float:
        """The 90 % quantile so far beyond the data, in factors of e."""
        return self.at_edge + self.growth * distance


def cross_validate(points: Points, fit: Callable[[Points], Law], *, only_first: bool = False) -> dict[str, Error]:
    """Errors by kind; a kind for which there are too few sizes, steps or noise levels is missing.

    Args:
      fit: from points to a law.
      only_first: leaves out the nearest part of what lies beyond alone, which is what forms are compared by; then the
        errors have no growth.
    """
    errors = {}
    for kind, folds in _folds(points).items():
        relative, distances = [], []
        for test, distance in folds if kind == BETWEEN or not only_first else folds[:1]:
            law = fit(points.where(~test))
            left_out = points.where(test)
            predicted = law.loss(left_out.parameters, left_out.steps, left_out.ratio)
            relative.append(np.abs(predicted / left_out.loss - 1))
            distances.append(distance)
        pooled = np.concatenate([*relative, np.array([])])
        known = np.isfinite(pooled)
        if known.any():
            pooled, far = pooled[known], np.concatenate(distances)[known]
            ninety = float(np.quantile(pooled, 0.9))
            line = (ninety, 0.0) if kind == BETWEEN or only_first else _line_of_quantile(far, pooled, 0.9)
            errors[kind] = Error(float(np.median(pooled)), ninety, len(pooled), *line)
    return errors


def _line_of_quantile(x: np.ndarray, y: np.ndarray, share: float) -> tuple[float, float]:
    """(value at 0, slope) of the straight line, neither negative, below which a share of the points lies (quantile
    regression, Koenker and Bassett 1978, as a linear program).
    """
    n = len(x)
    cost = np.concatenate([[0.0, 0.0], np.full(n, share), np.full(n, 1 - share)])
    equal = sparse.hstack([sparse.csr_matrix(np.stack([np.ones(n), x], axis=-1)), sparse.eye(n), -sparse.eye(n)])
    found = optimize.linprog(cost, A_eq=equal, b_eq=y, bounds=(0, None), method="highs")
    return float(found.x[0]), float(found.x[1])


def kinds(law: Law, parameters: float, steps: float, ratio: float) -> list[str]:
    """The ways in which one configuration goes beyond what a law was fitted to."""
    beyond = {
        LARGER: parameters > law.domain.parameters[1],
        LONGER: steps > law.domain.steps[1],
        NOISIER: ratio > law.domain.ratio[1],
    }
    return [kind for kind, is_beyond in beyond.items() if is_beyond] or [BETWEEN]


def expected_error(errors: dict[str, Error], law: Law, parameters: float, steps: float, ratio: float) -> float | None:
    """Returns the 90 % error of a prediction, with the errors of its kinds added in squares; None if one kind was never
    tested.
    """
    ways = kinds(law, parameters, steps, ratio)
    if any(way not in errors for way in ways):
        return None
    beyond = {
        BETWEEN: 0.0,
        LARGER: np.log(parameters / law.domain.parameters[1]),
        LONGER: np.log(steps / law.domain.steps[1]),
        NOISIER: np.log(max(ratio, 1e-300) / max(law.domain.ratio[1], 1e-300)),
    }
    # A line through errors beyond the edge may begin below the error inside; nothing is known better outside.
    inside = errors[BETWEEN].ninety if BETWEEN in errors else 0.0
    return float(np.sqrt(sum(max(inside, errors[way].at(float(beyond[way]))) ** 2 for way in ways)))


def _folds(points: Points) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each kind (mask of what is left out, how far beyond the rest each of it lies), one law at a time; what lies
    nearest beyond the data comes first.
    """
    sizes, ratios, steps = np.unique(points.parameters), np.unique(points.ratio), np.unique(points.steps)
    # Runs of several batches have noise levels of their own: what lies within a factor of two is one level.
    noisy, level = np.unique(np.round(np.log2(ratios[ratios > 0])), return_inverse=True)
    lowest, highest = ({k: end(ratios[ratios > 0][level == k]) for k in range(len(noisy))} for end in (np.min, np.max))
    inside = range(1, len(noisy) - 1)
    between = [points.parameters == size for size in sizes[1:-1]]
    between += [(points.ratio >= lowest[k]) & (points.ratio <= highest[k]) for k in inside]

    def beyond(values: np.ndarray, edges: list[float]) -> list[tuple[np.ndarray, np.ndarray]]:
        masks = [values > edge for edge in edges]
        return [(mask, np.log(values[mask] / edge)) for mask, edge in zip(masks, edges, strict=True)]

    folds = {BETWEEN: [(mask, np.zeros(mask.sum())) for mask in between]}
    if len(sizes) > 2:
        folds[LARGER] = beyond(points.parameters, list(sizes[-2:0:-1]))
    if len(steps) > 8:
        # The law must predict runs up to so many times as long as those that it is fitted to.
        cuts = [steps[steps <= steps[-1] / share] for share in (2.5, 1.6, 4.0)]
        folds[LONGER] = beyond(points.steps, [float(kept[-1]) for kept in cuts if len(kept) >= _FEWEST_STEPS])
    if len(noisy) > 3:
        folds[NOISIER] = beyond(
            points.ratio, [float(highest[k]) for k in range(len(noisy) - 2, max(-1, len(noisy) - 5), -1)]
        )
    return folds


def resampled(table: Table, seed: int) -> Table:
    """The table with as many runs, drawn from its own with replacement (a bootstrap by runs, not by points of one run's
    curve).

    A cell of the grid keeps at least one run: what is drawn are the learning rates, within each model and noise level.
    """
    rng = np.random.default_rng(seed)
    keys = np.stack([table[PARAMETERS], table[RATIO], table[LEARNING_RATE]], axis=-1)
    runs, of_row = np.unique(keys, axis=0, return_inverse=True)
    of_row = of_row.reshape(-1)
    chosen = []
    for cell in np.unique(runs[:, :2], axis=0):
        members = np.flatnonzero((runs[:, :2] == cell).all(axis=1))
        chosen += sorted(set(rng.choice(members, len(members)).tolist()))
    return table.rows(np.isin(of_row, chosen))


def bootstrap(table: Table, fit: Callable[[Table], Law], samples: int, seed: int = 0) -> list[Law]:
    """Laws of so many resampled tables."""
    return [fit(resampled(table, seed + i)) for i in range(samples)]


def interval(laws: list[Law], parameters, steps, ratio, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the central interval of the laws' predictions."""
    predictions = np.stack([law.loss(parameters, steps, ratio) for law in laws])
    return tuple(np.nanquantile(predictions, [(1 - level) / 2, (1 + level) / 2], axis=0))
