"""The noise that the drawing of batches adds to that of privacy, so that runs with different batches share one law.

Per-example gradients are clipped to norm 1, so the sum over a Poisson batch of B expected rows, divided by B, has a
variance of at most 1 / B around its mean, summed over the M parameters; the noise of privacy has M r^2, with r the
noise-batch ratio. So runs of one model size that agree in

    r_eff^p = r^p + (kappa / (B M))^(p / 2),    p = 2 and kappa at most about 1 in theory,

should have one loss, whatever their batches (Raisa et al. 2024, arXiv 2402.03990, compare the two variances likewise).
Both are measured: they are those with which the ends of runs with several batches lie closest to one smooth curve for
each size, number of steps and learning rate. p is below 2 where the two noises do not act alike: that of sampling lies
in the directions of the gradients, that of privacy in all.
"""

import dataclasses
import math

import numpy as np

from accounting.errors import InputError
from experiments.sweep.results import (
    BATCH,
    EVAL_LOSS,
    ITERATIONS,
    LEARNING_RATE,
    LOSS,
    PARAMETERS,
    RATIO,
    SEED,
    Table,
)

_KAPPAS = np.geomspace(0.1, 10, 81)
_POWERS = np.arange(1.0, 2.51, 0.25)
_DEGREE = 5  # of the curve, in ln r_eff, over up to nine octaves
_FEWEST = 9  # configurations of one size, steps and rate that a curve is fitted to
_FEWEST_SIZES = 2
_LOG_FLOOR = 1e-7  # of r_eff: below every ratio
FREEDOM = _DEGREE + 1  # numbers of a curve


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the batch enters the noise.

    Attributes:
      kappa: as above; 0 where the batch is not in the law, because all runs had one.
      largest_batch: of the runs; for larger ones the formula is trusted beyond what was measured.
      power: p.
    """

    kappa: float = 0.0
    largest_batch: float = math.inf
    power: float = 2.0

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        """r_eff of a noise-batch ratio, a batch and a model size; they broadcast."""
        ratio = np.asarray(ratio, float)
        if self.kappa == 0.0:
            return np.broadcast_arrays(ratio, batch_size, parameters)[0]
        drawn = self.kappa / (np.asarray(batch_size, float) * np.asarray(parameters, float))
        return (ratio**self.power + drawn ** (self.power / 2)) ** (1 / self.power)


@dataclasses.dataclass(frozen=True)
class Collapse:
    """How well runs with different batches fall on one curve.

    Attributes:
      kappa, power: with which they do so best.
      rms: of what is left, in ln loss, by degrees of freedom, by model size, with the number of configurations.
      rms_without: with kappa 0.
    """

    kappa: float
    power: float
    rms: dict[float, tuple[float, int]]
    rms_without: float

    @property
    def pooled(self) -> float:
        """Root mean square over the sizes."""
        return math.sqrt(sum(rms**2 for rms, _ in self.rms.values()) / len(self.rms))


def is_measured(table: Table) -> bool:
    """Whether the table has runs with several batches."""
    return BATCH in table.columns and len(np.unique(table[BATCH][~np.isnan(table[BATCH])])) > 1


def with_effective_ratio(table: Table) -> tuple[Table, Sampling]:
    """The table with the effective ratio in place of the noise-batch ratio, and without the batch, where it has runs
    with several; else as it is.

    Raises:
      InputError: the batches differ in such a way that their effect cannot be told from others.
    """
    if not is_measured(table):
        return table, Sampling()
    found = collapse(table.rows(~table.held_out))
    sampling = Sampling(found.kappa, float(np.nanmax(table[BATCH])), found.power)
    return apply(table, sampling), sampling


def apply(table: Table, sampling: Sampling) -> Table:
    """The table as a law sees it that was fitted with this sampling."""
    if sampling.kappa == 0.0:
        return table
    columns = {name: column for name, column in table.columns.items() if name != BATCH}
    columns[RATIO] = sampling.effective(table[RATIO], table[BATCH], table[PARAMETERS])
    return Table(columns)


def collapse(table: Table) -> Collapse:
    """Measures kappa and the power.

    Raises:
      InputError: too few sizes have runs that differ in the batch and agree in steps and learning rate.
    """
    groups = _groups(_ends(table))
    if len({size for size, _ in groups}) < _FEWEST_SIZES:
        batches = np.unique(table[BATCH][~np.isnan(table[BATCH])])
        raise InputError(
            f"the table mixes runs that differ in 'Batch Size' ({', '.join(f'{b:g}' for b in batches[:4])}), too few of"
            f" which agree in all but noise and batch ({_FEWEST} configurations at each of {_FEWEST_SIZES} sizes):"
            " fit each kind by itself, or sweep several batches at each size"
        )

    def misfits(sampling: Sampling) -> list[tuple[float, float, int]]:
        return [(size, _misfit(rows, sampling), len(rows)) for size, rows in groups]

    def pooled(sampling: Sampling) -> float:
        return math.sqrt(float(np.mean([misfit**2 for _, misfit, _ in misfits(sampling)])))

    best = min((Sampling(float(kappa), power=float(power)) for kappa in _KAPPAS for power in _POWERS), key=pooled)
    by_size: dict[float, list[tuple[float, int]]] = {}
    for size, misfit, count in misfits(best):
        by_size.setdefault(size, []).append((misfit, count))
    rms = {
        size: (math.sqrt(float(np.mean([m**2 for m, _ in found]))), sum(n for _, n in found))
        for size, found in sorted(by_size.items())
    }
    return Collapse(best.kappa, best.power, rms, pooled(Sampling()))


def _ends(table: Table) -> np.ndarray:
    """The ends of all runs: columns parameters, steps, learning rate, ratio, batch, loss; held-out losses where all
    runs have one, as they are measured on more rows.
    """
    seeds = np.nan_to_num(table[SEED]) if SEED in table.columns else np.zeros(len(table))
    keys = np.stack([table[PARAMETERS], table[LEARNING_RATE], table[RATIO], table[BATCH], seeds], axis=-1)
    # Runs that differ in their length alone are told apart by where their iterations begin.
    order = np.lexsort((table[ITERATIONS], *keys.T))
    if EVAL_LOSS in table.columns and np.isfinite(table[EVAL_LOSS]).any():
        rows, column = np.flatnonzero(np.isfinite(table[EVAL_LOSS])), EVAL_LOSS
    else:
        last = np.append((np.diff(keys[order], axis=0) != 0).any(axis=1), True)
        rows, column = order[last], LOSS
    names = (PARAMETERS, ITERATIONS, LEARNING_RATE, RATIO, BATCH, column)
    ends = np.stack([table[name][rows] for name in names], axis=-1)
    return ends[np.isfinite(ends).all(axis=1) & (ends[:, 5] > 0)]


def _groups(ends: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """(size, columns [n, 5] of ratio, batch, size, mean ln loss, number of seeds) for each size, steps and rate with
    several batches.
    """
    groups = []
    for key in np.unique(ends[:, :3], axis=0):
        of_key = ends[(ends[:, :3] == key).all(axis=1)]
        cells, inverse = np.unique(of_key[:, 3:5], axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        if len(cells) < _FEWEST or len(np.unique(cells[:, 1])) < 2:
            continue
        counts = np.bincount(inverse)
        means = np.bincount(inverse, np.log(of_key[:, 5])) / counts
        size = np.full(len(cells), key[0])
        groups.append((float(key[0]), np.column_stack([cells, size, means, counts])))
    return groups


def _misfit(rows: np.ndarray, sampling: Sampling) -> float:
    """Root mean square distance, in ln loss, of configurations from a polynomial in ln r_eff, by degrees of freedom."""
    ratio, batch, size, target, count = rows.T
    x = np.log(np.maximum(sampling.effective(ratio, batch, size), _LOG_FLOOR))
    x = (x - x.mean()) / max(x.std(), 1e-9)
    weight = np.sqrt(count / count.mean())
    residual = (target - np.polyval(np.polyfit(x, target, _DEGREE, w=weight), x)) * weight
    return math.sqrt(float((residual**2).sum()) / (len(rows) - FREEDOM))
