"""Table 2: the compute that is enough, the least within 1 % of the best loss over all compute."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Sequence

from experiments.figures.study import Study
from experiments.planning import published


@dataclasses.dataclass(frozen=True)
class Row(published.Row):
    """A row as table 2 has it; all numbers but the first two NaN where the law knows no configuration.

    Attributes:
      at_end: in what the configuration is at the end of the law's data ("largest model", "longest run"), so that it is
        a bound.
    """

    at_end: tuple[str, ...]


HEAD = ("units", "epsilon", "compute", "loss", "parameters", "steps", "batch", "tokens_per_parameter", "at_end")


def table(asked: Study, num_units: Sequence[float], epsilons: Sequence[float]) -> list[Row]:
    """Returns a row for each number of units and epsilon, grouped by the number of units."""
    return [_row(asked, units, epsilon) for units in num_units for epsilon in epsilons]


def _row(asked: Study, num_units: float, epsilon: float) -> Row:
    curve = asked.frontier(num_units, epsilon)
    i = curve.knee
    if i is None:
        return Row(num_units, epsilon, *[math.nan] * 6, ())
    ends = asked.ends(curve.parameters[i], curve.steps[i])
    values = (curve.compute, curve.loss, curve.parameters, curve.steps, curve.batch_size, curve.tokens_per_parameter)
    return Row(
        num_units,
        epsilon,
        *(float(column[i]) for column in values),
        tuple(name for name, there in ends.items() if there),
    )


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """As CSV; what is missing is empty."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        for row in rows:
            *numbers, ends = dataclasses.astuple(row)
            writer.writerow([*("" if math.isnan(x) else f"{x:.6g}" for x in numbers), "; ".join(ends)])
