"""How well runs with different batches fall on one curve of the effective noise-batch ratio.

    python -m experiments.benchmarks.batch_collapse [--table=results.csv]

Prints one JSON object: kappa and power of r_eff^p = r^p + (kappa / (B M))^(p / 2), measured over all sizes at once, and
by model size the root mean square distance of the runs' ends from one smooth curve, in ln loss, as it is and with what
the curve itself adapts to counted; and the latter without the batch.
"""

import argparse
import json
import math
import pathlib

from experiments.laws import fitting, sampling
from experiments.sweep import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=pathlib.Path, default=fitting.SHIPPED / "results.csv")
    table = results.read(parser.parse_args().table)
    found = sampling.collapse(table.rows(~table.held_out))
    by_size = [
        {
            "parameters": size,
            "configurations": count,
            "rms": rms * math.sqrt((count - sampling.FREEDOM) / count),
            "rms_by_degrees_of_freedom": rms,
        }
        for size, (rms, count) in found.rms.items()
    ]
    print(
        json.dumps(
            {
                "kappa": found.kappa,
                "power": found.power,
                "sizes": by_size,
                "rms_by_degrees_of_freedom": found.pooled,
                "rms_without_the_batch": found.rms_without,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
