"""How long a law takes to fit to a table of the published size: 7 sizes, 19 noise levels, 3 rates, 1280 points each.

    python -m experiments.benchmarks.large_table

The losses are those of a form with 0.4 % of noise. Prints one JSON object: rows, seconds, and how far the law is off
at places that are no points of the table.
"""

import json
import time

import numpy as np

from experiments.laws import fitting, forms
from experiments.sweep import results

SIZES = np.array(list(results.BERT_PARAMETERS.values()))
RATIOS = np.array([0.0, *(2.0 ** -np.arange(6.0, 24.0))])
RATES = 2.0 ** -np.array([7.0, 8.0, 9.0])
STEPS = np.arange(100.0, 128_001.0, 100.0)
LAW = forms.Parametric("coupled", (0.3, -1.0, 0.25, 0.0, 0.35, -9.0, 0.4, 1.1, 0.45), (4e7, 2e4))


def table() -> results.Table:
    """Rows as the published ones, with a best rate of 2^-8 everywhere."""
    rng = np.random.default_rng(0)
    size, ratio, rate, steps = (x.ravel() for x in np.meshgrid(SIZES, RATIOS, RATES, STEPS, indexing="ij"))
    names = dict(zip(SIZES.tolist(), results.BERT_PARAMETERS, strict=True))
    off = 0.02 * (np.log2(rate) + 8) ** 2 + 0.004 * rng.standard_normal(len(size))
    return results.Table(
        {
            results.MODEL: np.array([names[each] for each in size.tolist()]), results.LEARNING_RATE: rate,
            results.ITERATIONS: steps, results.RATIO: ratio, results.PARAMETERS: size,
            results.LOSS: LAW.loss(size, steps, ratio) * np.exp(off),
        }
    )  # fmt: skip


def main() -> None:
    rows = table()
    start = time.perf_counter()
    fitted = fitting.fit(rows)
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(1)
    places = [np.exp(rng.uniform(*np.log(ends), 1000)) for ends in ((5e6, 7e8), (2e3, 1.2e5), (2.0**-22, 2.0**-7))]
    off = np.abs(fitted.law.loss(*places) / LAW.loss(*places) - 1)
    print(
        json.dumps(
            {"rows": len(rows), "seconds": seconds, "median_error": float(np.median(off)),
             "ninety_percent_error": float(np.quantile(off, 0.9))},
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
