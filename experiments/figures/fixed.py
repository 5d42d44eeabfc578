"""Figure 5: what configurations that are not chosen for their epsilon lose against those that are."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.figures import drawing
from experiments.figures.drawing import Key, Plot, Row
from experiments.figures.study import Study

LESS = 5  # the second optimum has this share of the compute
# Where on the logarithmic range of steps the smallest, the middle and the largest model train: in arXiv 2501.18914 the
# larger, the longer.
_PLACES = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A model, its number of parameters, and the steps and batch with which it spends the compute."""

    name: str
    parameters: float
    steps: float
    batch_size: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The best configurations of one compute budget, for several epsilons.

    Attributes:
      epsilons: [n].
      configurations: with their losses [n] in `losses`; NaN outside of the law's data.
      best, best_of_less: [n], the lowest loss for the compute, and for a fifth of it.
    """

    num_units: float
    compute: float
    epsilons: np.ndarray
    configurations: list[Configuration]
    losses: list[np.ndarray]
    best: np.ndarray
    best_of_less: np.ndarray


def configurations(asked: Study, sizes: dict[str, float], compute: float, num_units: float) -> list[Configuration]:
    """The smallest, the middle and the largest model, as far as they can spend the compute within the law's steps."""
    names = sorted(sizes, key=sizes.get)
    chosen = {names[0]: _PLACES[0], names[len(names) // 2]: _PLACES[1], names[-1]: _PLACES[2]}
    shortest, longest = asked.law.domain.steps
    found = []
    for name, place in chosen.items():
        rows = compute / (6 * asked.sequence_length * sizes[name])  # batch times steps
        least, most = max(shortest, rows / num_units), min(longest, rows)
        if least <= most:
            steps = min(max(shortest * (longest / shortest) ** place, least), most)
            found.append(Configuration(name, sizes[name], steps, min(rows / steps, num_units)))
    return found


def compare(
    asked: Study, sizes: dict[str, float], compute: float, num_units: float, epsilons: Sequence[float]
) -> Comparison:
    """The losses over epsilon.

    Args:
      sizes: the models that were trained, by name.
    """
    chosen = configurations(asked, sizes, compute, num_units)
    losses = [
        np.array([asked.loss(c.parameters, c.steps, c.batch_size, num_units, e) for e in epsilons]) for c in chosen
    ]
    best, less = (np.array([asked.best_loss(compute / share, num_units, e) for e in epsilons]) for share in (1, LESS))
    return Comparison(num_units, compute, np.array(epsilons), chosen, losses, best, less)


def plot(found: Comparison) -> Plot:
    colours = drawing.UNORDERED[: len(found.configurations)]

    def draw(axes):
        for losses, colour in zip(found.losses, colours, strict=True):
            drawing.line(axes, found.epsilons, losses, colour, marker="o", markersize=3)
        drawing.line(axes, found.epsilons, found.best, drawing.INK, linewidth=2.2)
        drawing.line(axes, found.epsilons, found.best_of_less, drawing.INK, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="epsilon", ylabel="cross entropy (nats)")

    def text(c):
        return f"{drawing.number(c.parameters)}: {math.floor(c.steps + 0.5)} steps of {drawing.number(c.batch_size)}"

    keys = [Key(text(c), colour) for c, colour in zip(found.configurations, colours, strict=True)]
    keys += [Key("best for this compute", drawing.INK), Key(f"best for 1/{LESS} of it", drawing.INK, "dashed")]
    return Plot(
        "fig5",
        "Fixed configurations against the best",
        f"Predicted loss over epsilon of configurations that all spend {drawing.power(found.compute)} FLOP on"
        f" {drawing.number(found.num_units)} units, against the best for each epsilon with that compute and with a"
        " fifth of it.",
        (Row((draw,), tuple(keys)),),
    )
