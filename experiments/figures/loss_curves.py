"""Figure 3: the loss against the compute for several numbers of units, and the tokens per parameter of the best
configurations.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.figures import drawing, study
from experiments.figures.drawing import Key, Plot, Row
from experiments.figures.study import Frontier, Study
from experiments.planning.optimum import NonPrivate

CHINCHILLA = 20.0  # tokens per parameter without privacy (arXiv 2203.15556)


@dataclasses.dataclass(frozen=True)
class TokensPerParameter:
    """Tokens per parameter of the best configurations over the compute, for one epsilon.

    Attributes:
      compute, ratio: [n]; NaN where the law knows no configuration.
      at_end: [n], mask of the points at an end of the law's data, which are bounds and no optima.
    """

    epsilon: float
    compute: np.ndarray
    ratio: np.ndarray
    at_end: np.ndarray


def losses(asked: Study, num_units: Sequence[float], epsilon: float) -> list[Frontier]:
    """3a and 3b: a frontier for each number of units; what is drawn is its running minimum and its knee."""
    return study.frontiers(asked, num_units, [epsilon])


def tokens_per_parameter(
    asked: Study, num_units: float, epsilons: Sequence[float], every: int = 3
) -> list[TokensPerParameter]:
    """Returns the curves of figure 3c, one for each epsilon.

    Args:
      every: of so many points of a frontier one is kept; the loss is so flat around its minimum that neighbours differ
        by chance.
    """
    found = study.frontiers(asked, [num_units], epsilons)
    at_end = [asked.at_an_end(curve.parameters, curve.steps) for curve in found]
    return [
        TokensPerParameter(curve.epsilon, curve.compute[::every], curve.tokens_per_parameter[::every], ends[::every])
        for curve, ends in zip(found, at_end, strict=True)
    ]


def without_privacy(asked: Study, non_private: NonPrivate, physical_batch: float) -> tuple[np.ndarray, np.ndarray]:
    """(compute, tokens per parameter) of the law's optimum without noise, NaN where it lies outside of what was
    trained.
    """
    domain = asked.law.domain

    def tokens_of(steps):
        return steps * physical_batch * asked.sequence_length

    compute = np.geomspace(
        6 * domain.parameters[0] * tokens_of(domain.steps[0]), 6 * domain.parameters[1] * tokens_of(domain.steps[1]), 50
    )
    parameters, tokens = np.array([non_private.optimum(operations) for operations in compute]).T
    inside = domain.contains(parameters, tokens / tokens_of(1), domain.ratio[0])
    return compute, np.where(inside, tokens / parameters, np.nan)


def plot_losses(asked: Study, panels: Sequence[list[Frontier]]) -> Plot:
    """One panel for each epsilon."""
    colours = drawing.ordered(len(panels[0]))

    def panel(found: list[Frontier]):
        def draw(axes):
            for i, (curve, colour) in enumerate(zip(found, colours, strict=True)):
                drawing.line(axes, curve.compute, curve.running, colour)
                if curve.knee is not None:
                    x, y = curve.compute[curve.knee], curve.running[curve.knee]
                    ring = bool(asked.at_an_end(curve.parameters[curve.knee], curve.steps[curve.knee]))
                    drawing.dot(axes, x, y, colour, ring=ring)
                    text = drawing.number(curve.parameters[curve.knee])
                    # The lower a curve, the lower its label, so that they do not meet where the knees do.
                    axes.annotate(
                        text, (x, y), xytext=(6, 12 + 13 * (len(found) - 1 - i)), textcoords="offset points",
                        color=colour, fontsize=8.5,
                        fontweight="bold",
                        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2},
                    )  # fmt: skip
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="compute (FLOP)",
                ylabel="cross entropy (nats per token)",
                title=f"epsilon {found[0].epsilon:g}",
            )
            drawing.plain_ticks(axes.yaxis)

        return draw

    keys = tuple(
        Key(f"{drawing.number(curve.num_units)} units", colour)
        for curve, colour in zip(panels[0], colours, strict=True)
    )
    marks = Key("enough compute", drawing.QUIET, "dot"), Key("at an end of the data", drawing.QUIET, "ring")
    return Plot(
        "fig3ab",
        "What more compute brings",
        "The lowest predicted loss of each compute or less, for several numbers of units; the dot is the least compute"
        " within 1 % of the lowest loss of all, with the size of its model, and a ring in its place where that lies at"
        " an end of the data.",
        (Row(tuple(panel(found) for found in panels), (*keys, *marks)),),
    )


def plot_tokens(found: list[TokensPerParameter], num_units: float, clean: tuple[np.ndarray, np.ndarray]) -> Plot:
    colours = drawing.ordered(len(found))
    compute, ratio = clean

    def draw(axes):
        for curve, colour in zip(found, colours, strict=True):
            drawing.line(
                axes, curve.compute, np.where(curve.at_end, np.nan, curve.ratio), colour, marker="o", markersize=2.5
            )
            ends = np.where(curve.at_end, curve.ratio, np.nan)
            drawing.line(
                axes,
                curve.compute,
                ends,
                colour,
                linestyle="",
                marker="o",
                markerfacecolor="white",
                markersize=3.5,
                alpha=0.6,
            )
        drawing.line(axes, compute, ratio, drawing.INK)
        if axes.has_data():
            axes.axhline(CHINCHILLA, color=drawing.INK, linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="compute (FLOP)", ylabel="tokens per parameter")

    keys = [Key(f"epsilon {curve.epsilon:g}", colour) for curve, colour in zip(found, colours, strict=True)]
    keys += [Key("Chinchilla: 20", drawing.INK, "dashed"), Key("at an end of the data", drawing.QUIET, "ring")]
    if np.isfinite(ratio).any():
        keys.insert(-1, Key("this law without privacy", drawing.INK))
    return Plot(
        "fig3c",
        "Tokens per parameter",
        f"Tokens seen per parameter by the best configuration for each compute with {drawing.number(num_units)} units;"
        " rings are at the smallest or the largest model or the shortest or the longest run of the law, where the true"
        " optimum may lie beyond.",
        (Row((draw,), tuple(keys)),),
    )
