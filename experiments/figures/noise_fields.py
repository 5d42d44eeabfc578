"""Figure 4: by how much the noise-batch ratio falls when one budget is doubled. Accounting alone, no law.

The budgets are epsilon, the batch and the number of units; each field keeps the third where it is.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from experiments.figures import drawing
from experiments.figures.drawing import Plot, Row

STEPS, DELTA = 16_000, 1e-8
EPSILON, BATCH, UNITS = "epsilon", "batch", "units"
FIXED = {UNITS: 2.0**24, EPSILON: 4.0, BATCH: 65536.0}
POWERS = {EPSILON: tuple(range(-2, 7)), BATCH: tuple(range(8, 23, 2)), UNITS: tuple(range(16, 31, 2))}
PAIRS = ((EPSILON, BATCH), (UNITS, BATCH), (UNITS, EPSILON))


@dataclasses.dataclass(frozen=True)
class Field:
    """Noise-batch ratios over two budgets, and how they change.

    Attributes:
      x, y: names of the budgets.
      xs, ys: their values, [a] and [b].
      ratio: [a, b]; NaN where the batch would hold more than all units.
      along_x, along_y: [a, b], relative change of the ratio on doubling one budget; -0.5 halves it.
    """

    x: str
    y: str
    xs: np.ndarray
    ys: np.ndarray
    ratio: np.ndarray
    along_x: np.ndarray
    along_y: np.ndarray


def field(x: str, y: str, powers: dict[str, Sequence[int]], noise: Callable[[float], Callable]) -> Field:
    """The field of one pair of budgets.

    Args:
      powers: of two, by budget.
      noise: from epsilon to the noise multiplier of (steps, sampling probability), at DELTA.
    """
    xs, ys = (2.0 ** np.array(powers[name], float) for name in (x, y))

    def at(u, v):
        return _ratio(FIXED | {x: u[:, None], y: v[None, :]}, noise)

    ratio = at(xs, ys)
    return Field(x, y, xs, ys, ratio, at(2 * xs, ys) / ratio - 1, at(xs, 2 * ys) / ratio - 1)


def _ratio(budgets: dict, noise: Callable[[float], Callable]) -> np.ndarray:
    epsilon, batch, units = np.broadcast_arrays(budgets[EPSILON], budgets[BATCH], budgets[UNITS])
    probability = np.where(batch <= units, batch / units, np.nan)
    sigma = np.full(probability.shape, np.nan)
    for value in np.unique(epsilon):
        chosen = (epsilon == value) & np.isfinite(probability)
        if chosen.any():
            sigma[chosen] = noise(float(value))(np.full(chosen.sum(), float(STEPS)), probability[chosen])
    return sigma / batch


def plot(fields: Sequence[Field]) -> Plot:
    return Plot(
        "fig4",
        "Which budget lowers the noise most",
        "Each arrow shows how much of the noise-batch ratio doubling the budget of either axis takes away, at"
        f" {STEPS:,} steps and delta {DELTA:g} (accounting alone, no law): it points towards the budget that helps"
        " more, and the grey lines are the ratio.",
        (Row(tuple(_panel(found) for found in fields)),),
    )


def _panel(found: Field):
    titles = {
        UNITS: f"$2^{{{np.log2(FIXED[UNITS]):.0f}}}$ units",
        EPSILON: f"epsilon {FIXED[EPSILON]:g}",
        BATCH: f"batch {FIXED[BATCH]:.0f}",
    }
    labels = {EPSILON: "epsilon", BATCH: "batch (units)", UNITS: "units"}
    (third,) = set(FIXED) - {found.x, found.y}

    def draw(axes):
        x, y = np.meshgrid(np.log2(found.xs), np.log2(found.ys), indexing="ij")
        ratio = np.ma.masked_invalid(np.log10(found.ratio))
        if ratio.count():
            lines = axes.contour(
                x, y, ratio, levels=np.arange(-12, 3), colors="#b5b5b5", linewidths=0.9, linestyles="-"
            )
            axes.clabel(lines, fmt=lambda level: f"$10^{{{level:.0f}}}$", fontsize=7.5)
        u, v = -found.along_x, -found.along_y
        there = np.isfinite(u) & np.isfinite(v)
        cell = (np.ptp(x) / max(1, len(found.xs) - 1), np.ptp(y) / max(1, len(found.ys) - 1))
        # Half, which is what doubling the batch or units can bring, is as long as the distance of two arrows.
        axes.quiver(
            x[there], y[there], 2 * 0.9 * cell[0] * u[there], 2 * 0.9 * cell[1] * v[there], angles="xy",
            scale_units="xy", scale=1,
            color=drawing.ACCENT, width=0.006, headwidth=4, headlength=4.5, headaxislength=4,
        )  # fmt: skip
        for axis, values in ((axes.xaxis, found.xs), (axes.yaxis, found.ys)):
            powers = np.log2(values)
            shown = powers[:: 1 + len(powers) // 6]
            axis.set_ticks(shown, [f"$2^{{{p:.0f}}}$" for p in shown])
        axes.set(
            xlabel=labels[found.x], ylabel=labels[found.y], title=titles[third],
            xlim=(x.min() - 0.5 * cell[0], x.max() + cell[0]), ylim=(y.min() - 0.5 * cell[1], y.max() + cell[1]),
        )  # fmt: skip

    return draw
