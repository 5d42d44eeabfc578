"""What a step on users costs beside one on as many rows that are units of their own.

Users have numbers of rows by Zipf's law, cut at `--rows_per_unit`; their rows are those of the other batch, which has
one unit for each. Both sums are computed in turns, on a grid as exact releases are. Prints one JSON object: seconds of
both, the median of their ratios, and what a strategy costs that computes all places.

    python -m experiments.benchmarks.users --model=tiny --rows=256 --rows_per_unit=16
"""

import argparse
import json
import statistics
import time

import numpy as np

from dpgemma.commands import process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rows_per_unit", type=int, default=16)
    parser.add_argument("--exponent", type=float, default=1.5, help="of Zipf's law")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    process.split_cpu("data:1")
    import jax

    from accounting.mechanism import Clip
    from dpgemma.data.batch import Batch
    from dpgemma.privacy.clipping import Strategy
    from dpgemma.sharding import mesh as mesh_lib
    from dpgemma.training.prepare import objective_of
    from dpgemma.training.settings import Settings
    from dpgemma.training.step import sharded_clipped_sum

    objective = objective_of(Settings(model=arguments.model, sequence_length=arguments.sequence_length, mesh="data:1"))
    rng, k, counts = np.random.default_rng(0), arguments.rows_per_unit, []
    while sum(counts) < arguments.rows:
        counts.append(min(int(rng.zipf(arguments.exponent)), k, arguments.rows - sum(counts)))
    rows = objective.noise_rows(arguments.rows)
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    real = np.zeros((len(counts), k), bool)
    real[owner, place] = True
    placed = {}
    for name, column in rows.items():
        placed[name] = np.zeros((len(counts), k, *column.shape[1:]), column.dtype)
        placed[name][owner, place] = column
    batches = {"users": Batch(placed, real), "rows": Batch.of_rows(rows, np.ones(arguments.rows, bool))}
    ways = {"users": Strategy("example_scan"), "rows": Strategy("example_scan"), "all_places": Strategy("ghost")}
    batches["all_places"] = batches["users"]
    mesh, (trainable, frozen) = mesh_lib.make("data:1"), objective.init(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    programs = {
        name: jax.jit(
            lambda trainable, batch, how=how: sharded_clipped_sum(
                objective.loss, trainable, frozen, batch, Clip(1.0), how, mesh, steps=2.0**20
            )
        )
        for name, how in ways.items()
    }
    for number in range(arguments.rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            begin = time.perf_counter()
            jax.block_until_ready(programs[name](trainable, batches[name]))
            if number:
                seconds[name].append(time.perf_counter() - begin)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["rows"], strict=True))

    print(
        json.dumps(
            {
                "users": len(counts),
                "rows": arguments.rows,
                "rows_per_unit": k,
                "largest_users": sorted(counts)[-5:],
                "seconds": {name: statistics.median(values) for name, values in seconds.items()},
                "users_over_rows": ratio("users"),
                "all_places_over_rows": ratio("all_places"),
            }
        )
    )


if __name__ == "__main__":
    main()
