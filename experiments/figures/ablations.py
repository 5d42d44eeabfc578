"""Figure 6: the best loss where one of steps, model size and batch is fixed, as one of epsilon, units and compute
varies.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.figures import drawing
from experiments.figures.drawing import Key, Plot, Row
from experiments.figures.study import Study
from experiments.planning.optimum import Candidates

COLUMNS = {"steps": "steps", "parameters": "model size (parameters)", "batch_size": "batch (units)"}
EPSILON, UNITS, COMPUTE = "epsilon", "units", "compute"
_HEADINGS = {EPSILON: "epsilon", UNITS: "the number of units", COMPUTE: "the compute"}
_COMPUTES = 4


@dataclasses.dataclass(frozen=True)
class Curve:
    """The best loss of one budget against what is fixed.

    Attributes:
      value: of the budget that varies.
      panels: of each of COLUMNS (its values, the lowest losses), rising.
    """

    value: float
    panels: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A row of the figure: the curves of one budget that varies, while the others stay at the centre."""

    varied: str
    curves: list[Curve]


def panels(asked: Study, compute: float, num_units: float, epsilon: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns, for each of COLUMNS, (its values, the lowest loss at each). Steps go down from the longest run by
    factors of 2^(1/4).
    """
    shortest, longest = asked.law.domain.steps
    steps = longest * 2.0 ** (-np.arange(math.floor(4 * math.log2(longest / shortest) + 1e-9), -1, -1) / 4)
    # A search has batches of its own and lets the steps follow; here the batch follows.
    losses = np.nan_to_num(asked.losses_by_steps(steps, compute, num_units, epsilon), nan=np.inf)
    return {
        "steps": _finite(steps, losses.min(axis=1)),
        "parameters": _finite(asked.sizes, losses.min(axis=0)),
        "batch_size": _by_batch(asked.candidates(compute, num_units, epsilon)),
    }


def _finite(values: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[np.isfinite(losses)], losses[np.isfinite(losses)]


def _by_batch(found: Candidates | None) -> tuple[np.ndarray, np.ndarray]:
    if found is None:
        return np.array([]), np.array([])
    places, group = np.unique(found.batch_size, return_inverse=True)
    losses = np.full(len(places), np.inf)
    np.minimum.at(losses, group.reshape(-1), found.loss)
    return places, losses


def computes(asked: Study, centre: float, num_units: float, count: int = _COMPUTES) -> tuple[float, ...]:
    """The centre and its neighbours a factor of 10 apart (100 where the law reaches over eight decades), within the
    law's range.
    """
    low, high = asked.compute_range(num_units)
    factor = 100.0 if high / low > 1e8 else 10.0
    around = [centre * factor**k for k in range(-6, 7)]
    inside = [value for value in around if low < value < high] or [centre]
    return tuple(sorted(sorted(inside, key=lambda value: abs(math.log(value / centre) - 0.1))[:count]))


def ablations(
    asked: Study,
    centre: tuple[float, float, float],
    epsilons: Sequence[float],
    num_units: Sequence[float],
    compute: Sequence[float],
) -> list[Ablation]:
    """The three rows.

    Args:
      centre: epsilon, units, compute.
    """
    e, n, c = centre
    budgets = {
        EPSILON: [(value, (c, n, value)) for value in epsilons],
        UNITS: [(value, (c, value, e)) for value in num_units],
        COMPUTE: [(value, (value, n, e)) for value in compute],
    }
    rows = []
    for varied, asked_for in budgets.items():
        curves = [Curve(value, panels(asked, *budget)) for value, budget in asked_for]
        rows.append(Ablation(varied, curves))
    return rows


def plot(rows: Sequence[Ablation], centre: tuple[float, float, float]) -> Plot:
    e, n, c = centre
    name = {
        EPSILON: lambda v: f"epsilon {v:g}",
        UNITS: lambda v: f"{drawing.number(v)} units",
        COMPUTE: lambda v: f"{drawing.power(v)} FLOP",
    }

    def limits(row: Ablation) -> tuple[float, float]:
        """So that the minima can be told apart; curves that rise far above all of them are cut."""
        losses = [losses for curve in row.curves for _, losses in curve.panels.values() if len(losses)]
        if not losses:
            return 0.0, 1.0
        low, high = min(x.min() for x in losses), max(x.max() for x in losses)
        return 0.98 * low, min(1.02 * high, 1.3 * max(x.min() for x in losses))

    def panel(row: Ablation, column: str, colours: list[str]):
        def draw(axes):
            for curve, colour in zip(row.curves, colours, strict=True):
                values, losses = curve.panels[column]
                if len(values):
                    drawing.line(axes, values, losses, colour)
                    best = int(np.argmin(losses))
                    drawing.dot(axes, values[best], losses[best], colour)
            axes.set(xscale="log", xlabel=COLUMNS[column], ylabel="cross entropy (nats)", ylim=limits(row))
            drawing.plain_ticks(axes.xaxis)

        return draw

    drawn = []
    for row in rows:
        colours = drawing.ordered(len(row.curves))
        keys = tuple(
            Key(name[row.varied](curve.value), colour) for curve, colour in zip(row.curves, colours, strict=True)
        )
        drawn.append(
            Row(tuple(panel(row, column, colours) for column in COLUMNS), keys, f"{_HEADINGS[row.varied]} varies")
        )
    return Plot(
        "fig6",
        "What a wrong choice costs",
        "The lowest predicted loss with the number of steps, the model size or the batch fixed and all else at its"
        f" best, around epsilon {e:g}, {drawing.number(n)} units and {drawing.power(c)} FLOP; dots are the best of each"
        " line, and what is far worse is cut off.",
        tuple(drawn),
    )
