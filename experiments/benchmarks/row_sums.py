"""How long it takes to add rows of float32 numbers to rows of a table, as the gradient of an embedding does, in three
ways: XLA's scatter, a segment sum of sorted rows, and operations.add_rows' product.

On GPUs, jaxlib 0.10.2 to 0.11.0 compiles the first to a loop that is hundreds of times slower where ids repeat
(openxla/xla#46225, jax-ml/jax#38806), so versions are printed beside the times. Interleaved rounds, medians, ratios to
the scatter. Prints one JSON object.
"""

import argparse
import functools
import importlib.metadata
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.privacy import operations


def sorted_sum(table, ids, rows):
    order = jnp.argsort(ids)
    return table + jax.ops.segment_sum(rows[order], ids[order], len(table), indices_are_sorted=True)


WAYS = {
    "scatter": functools.partial(operations.add_rows, platform="tpu"),
    "sorted": sorted_sum,
    "product": functools.partial(operations.add_rows, platform="gpu"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=256_000)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    rng, content = np.random.default_rng(0), {}
    rows = jnp.asarray(rng.standard_normal((arguments.rows, arguments.width)), jnp.float32)
    table = jnp.zeros((arguments.words, arguments.width))
    # As words of a text occur, and the worst case: one word alone.
    drawn = {
        "zipf": np.minimum(rng.zipf(1.2, arguments.rows) - 1, arguments.words - 1),
        "one": np.zeros(arguments.rows),
    }
    for name, ids in drawn.items():
        ids, runs, taken = jnp.asarray(ids, jnp.int32), {}, {way: [] for way in WAYS}
        for way, add in WAYS.items():
            runs[way] = jax.jit(add, donate_argnums=0)
        for number in range(arguments.rounds + 1):
            for way, run in runs.items():
                start = time.perf_counter()
                table = jax.block_until_ready(run(table, ids, rows))
                if number:
                    taken[way].append(time.perf_counter() - start)
        ratios = {way: statistics.median(np.divide(taken[way], taken["scatter"]).tolist()) for way in WAYS}
        content[name] = {"ratio_to_scatter": ratios}
        if jax.default_backend() != "cpu":  # absolute times of a shared CPU say nothing
            content[name]["seconds"] = {way: statistics.median(seconds) for way, seconds in taken.items()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    print(json.dumps(content | {"versions": versions, "device": jax.devices()[0].device_kind}, indent=1))


if __name__ == "__main__":
    main()
