"""Which runs of a table a law must not be fitted to: those that diverged, to whatever number, and those whose losses
lie on another scale than their neighbours'.

Runs that diverge often end on a plateau of finite losses, and tables are put together from files in nats and in bits.
Neither shows in a single cell. A quadratic in ln M, ln T, the noise and the learning rate is fitted to the logarithms
of all losses, with weights that forget what lies far off (Cauchy's). A run is left out where it lies further from that
than its neighbours do, by more than any measurement is off.
"""

import numpy as np

from experiments.laws.learning_rate import monomials
from experiments.sweep.results import CONFIG, ITERATIONS, LEARNING_RATE, LOSS, MODEL, PARAMETERS, RATIO, SEED, Table

# In ln loss: half of what lies between nats and bits.
_FAR = 0.18
# And in deviations of the runs from it, as their median says (1.48 times it is a Gaussian's standard deviation).
_DEVIATIONS = 6 * 1.48
_NEIGHBOURS = 8
_JUDGEMENTS = 10
_POINTS_OF_A_RUN = 24
_ROUNDS = 30
_SPREAD = 0.05  # in ln loss: deviations beyond it lose weight


def sound(table: Table) -> tuple[Table, tuple[str, ...]]:
    """The rows of the runs that a law may be fitted to, and in words which runs are left out, and why.

    Args:
      table: rows of one kind; held-out ones are judged like the others.
    """
    runs = runs_of(table)
    finite = [bool((np.isfinite(table[LOSS][rows]) & (table[LOSS][rows] > 0)).all()) for rows in runs]
    whole = [rows for rows, is_finite in zip(runs, finite, strict=True) if is_finite]
    found = [
        f"{_name(table, rows)}: it diverged: a loss is not a number"
        for rows, is_finite in zip(runs, finite, strict=True)
        if not is_finite
    ]
    kept = whole
    if len(whole) > 1:
        off, is_sound = _judged(table, whole)
        kept = [rows for rows, good in zip(whole, is_sound, strict=True) if good]
        found += [
            f"{_name(table, rows)}: its losses are {np.exp(by):.2g} times what neighbouring runs suggest"
            for rows, by, good in zip(whole, off, is_sound, strict=True)
            if not good
        ]
    return table.rows(np.sort(np.concatenate([*kept, np.array([], int)]))), tuple(found)


def _judged(table: Table, runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """By how much each run is off, in ln loss, and whether it is sound.

    A run whose neighbours diverged seems to be off as well. So all are judged again beside those that seemed sound,
    until the judgement stays.
    """
    residuals, is_sound = _residuals(table, runs), np.ones(len(runs), bool)
    for _ in range(_JUDGEMENTS):
        near = _neighbours(table, runs, is_sound)
        compared = [of_part - np.median(of_part[near], axis=1) for of_part in residuals]
        off = np.where(np.abs(compared[0]) >= np.abs(compared[1]), *compared)
        limit = max(_FAR, _DEVIATIONS * float(np.median(np.abs(off[is_sound]))))
        before, is_sound = is_sound, np.abs(off) <= limit
        if (before == is_sound).all() or not is_sound.any():
            break
    return off, is_sound


def runs_of(table: Table) -> list[np.ndarray]:
    """The numbers of each run's rows, by its steps."""
    columns = [PARAMETERS, LEARNING_RATE, RATIO, *([SEED] if SEED in table.columns else [])]
    keys = [np.nan_to_num(table[name]) for name in columns]
    if CONFIG in table.columns:
        keys.append(np.unique(table[CONFIG], return_inverse=True)[1].reshape(-1).astype(float))
    _, inverse = np.unique(np.stack(keys, axis=-1), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.lexsort((table[ITERATIONS], inverse))
    return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)


def _name(table: Table, rows: np.ndarray) -> str:
    row = rows[0]
    rate, ratio = table[LEARNING_RATE][row], table[RATIO][row]
    return f"{table[MODEL][row]}, learning rate {rate:.4g}, noise-batch ratio {ratio:.4g}"


def _residuals(table: Table, runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How far each run lies from the quadratic, in ln loss: the median of all its points, and of its last quarter."""
    some = [rows[np.unique(np.linspace(0, len(rows) - 1, _POINTS_OF_A_RUN).astype(int))] for rows in runs]
    rows = np.concatenate(some)
    noisy = table[RATIO][table[RATIO] > 0]
    floor = float(noisy.min()) if len(noisy) else 1.0
    raw = np.stack(
        [
            np.log(table[PARAMETERS][rows]),
            np.log(table[ITERATIONS][rows]),
            0.5 * np.log(table[RATIO][rows] ** 2 + floor**2),
            np.log2(table[LEARNING_RATE][rows]),
        ],
        axis=-1,
    )
    design = monomials((raw - raw.mean(axis=0)) / np.maximum(raw.std(axis=0), 1e-9))
    target = np.log(table[LOSS][rows])
    residual = target - np.median(target)
    for _ in range(_ROUNDS):
        weight = 1 / (1 + (residual / _SPREAD) ** 2)
        root = np.sqrt(weight)[:, None]
        coefficients = np.linalg.lstsq(design * root, target * root[:, 0], rcond=1e-9)[0]
        residual = target - design @ coefficients
    parts = np.split(residual, np.cumsum([len(part) for part in some])[:-1])
    whole = np.array([np.median(part) for part in parts])
    late = np.array([np.median(part[-max(1, len(part) // 4) :]) for part in parts])
    return whole, late


def _neighbours(table: Table, runs: list[np.ndarray], among: np.ndarray) -> np.ndarray:
    """The numbers [n, k] of the runs that are nearest to each in the grid of sizes, noise and learning rates.

    Args:
      among: mask of those that may be neighbours.
    """
    first = [rows[0] for rows in runs]
    places = np.stack(
        [np.unique(table[name][first], return_inverse=True)[1] for name in (PARAMETERS, RATIO, LEARNING_RATE)], axis=-1
    )
    distance = np.abs(places[:, None, :] - places[None, :, :]).sum(axis=-1).astype(float)
    distance[:, ~among] = np.inf
    np.fill_diagonal(distance, np.inf)
    count = max(1, min(_NEIGHBOURS, int(among.sum()) - 1))
    return np.argsort(distance, axis=1, kind="stable")[:, :count]
