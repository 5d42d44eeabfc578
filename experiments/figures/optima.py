"""Figure 1: the compute-optimal model size, batch and number of steps against the compute."""

from collections.abc import Sequence

import numpy as np

from experiments.figures import drawing, study
from experiments.figures.drawing import Key, Plot, Row
from experiments.figures.study import Frontier, Study

_LABELS = {"parameters": "model size (parameters)", "batch_size": "batch (units)", "steps": "steps"}


def curves(asked: Study, num_units: float, epsilons: Sequence[float]) -> list[Frontier]:
    """The optimum, and the range of what comes within 1 % of it, for each epsilon."""
    return study.frontiers(asked, [num_units], epsilons)


def plot(asked: Study, found: list[Frontier]) -> Plot:
    colours = drawing.ordered(len(found))

    def panel(name: str):
        def draw(axes):
            for curve, colour in zip(found, colours, strict=True):
                values, near = getattr(curve, name), curve.near[name]
                bound = asked.at_an_end(curve.parameters, curve.steps)
                drawing.line(axes, curve.compute, np.where(bound, np.nan, values), colour)
                drawing.line(axes, curve.compute, np.where(bound, values, np.nan), colour, linestyle=":")
                axes.fill_between(curve.compute, near[:, 0], near[:, 1], color=colour, alpha=0.14, linewidth=0)
                if curve.knee is not None:
                    drawing.dot(
                        axes, curve.compute[curve.knee], values[curve.knee], colour, ring=bool(bound[curve.knee])
                    )
            axes.set(xscale="log", yscale="log", xlabel="compute (FLOP)", ylabel=_LABELS[name])
            drawing.plain_ticks(axes.yaxis)

        return draw

    keys = [Key(f"epsilon {curve.epsilon:g}", colour) for curve, colour in zip(found, colours, strict=True)]
    keys += [
        Key("within 1 % of the best", drawing.QUIET, "band"),
        Key("enough compute", drawing.QUIET, "dot"),
        Key("at an end of the data", drawing.QUIET, "dotted"),
    ]
    return Plot(
        "fig1",
        "The best configuration for a compute",
        "The model size, batch and number of steps of the lowest predicted loss for each compute with"
        f" {drawing.number(found[0].num_units)} units, the range of all that come within 1 % of it, and as a dot the"
        " compute from which on more brings less than 1 %. Where the model or the number of steps is at an end of the"
        " data, the line is dotted and the dot a ring: a bound, beyond which there may be better ones.",
        (Row(tuple(panel(name) for name in _LABELS), tuple(keys)),),
    )
