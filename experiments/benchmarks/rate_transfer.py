"""How the best learning rate moves with the size of the model at a fixed noise-batch ratio.

    python -m experiments.benchmarks.rate_transfer [--table=results.csv] [--steps=640]

For every model and ratio with three rates or more the best one is the vertex of a parabola through the ends of the
runs in the table's commonest batch; for every ratio log2 of these is a straight line in log2 of the parameters. A slope
of 0 means that a rate found for a small model holds for a large one. Prints one JSON object: by ratio the slope, its
standard error, and the vertices.
"""

import argparse
import json
import pathlib

import numpy as np

from experiments.laws import fitting, points
from experiments.sweep import results
from experiments.sweep.results import BATCH, ITERATIONS

_FEWEST_SIZES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=pathlib.Path, default=fitting.SHIPPED / "results.csv")
    parser.add_argument("--steps", type=float, default=640)
    settings = parser.parse_args()
    print(json.dumps(slopes(results.read(settings.table), settings.steps), indent=1))


def slopes(table: results.Table, steps: float) -> dict:
    """See the module."""
    table = table.rows(~table.held_out)
    batches, counts = np.unique(table[BATCH], return_counts=True)
    batch = float(batches[np.argmax(counts)])
    runs = points.usable(points.settled(table.rows(table[BATCH] == batch)))
    found = points.best(runs.rows(runs[ITERATIONS] == steps), points.VERTEX)
    by_ratio = []
    for ratio in np.unique(found.ratio):
        own = found.where(found.ratio == ratio)
        if len(own) < _FEWEST_SIZES:
            continue
        x, y = np.log2(own.parameters), np.log2(own.learning_rate)
        (slope, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
        left = y - np.polyval(np.polyfit(x, y, 1), x)
        error = float(np.sqrt(covariance[0, 0] * (left @ left) / max(1, len(x) - 2)))
        vertices = {f"{m:.0f}": round(float(v), 2) for m, v in zip(own.parameters, y, strict=True)}
        by_ratio.append({"ratio": ratio, "slope": float(slope), "standard_error": error, "log2_best_rate": vertices})
    return {"steps": steps, "batch": batch, "by_ratio": by_ratio}


if __name__ == "__main__":
    main()
