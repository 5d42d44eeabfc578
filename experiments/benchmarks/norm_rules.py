"""What the two ways to the norm of a product's gradient cost per floating-point operation, against the product itself.

Its result is the default cost in norm_rules. The shapes are those of small and middle-sized models at several lengths;
medians over shapes of interleaved rounds. Prints one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.privacy import norm_rules as ghost_norms

SHAPES = [(64, 448, 448), (256, 448, 448), (64, 448, 1792), (256, 448, 1792), (256, 1792, 448), (1024, 448, 1792)]
BATCH = 4


def ways(length: int, fan_in: int, fan_out: int) -> dict:
    """For each way, a compiled function of operands and its floating-point operations."""

    def gram(x, g):
        return ghost_norms._gram(x, g[None])[0]

    def instantiate(x, g):
        return ghost_norms._instantiated(x, g[None])[0]

    def of_batch(f):
        return jax.jit(jax.vmap(f))

    product = 2 * BATCH * length * fan_in * fan_out
    return {
        "product": (jax.jit(lambda x, g: jnp.einsum("btp,btq->pq", x, g)), product),
        "instantiate": (of_batch(instantiate), product),
        "gram": (of_batch(gram), 2 * BATCH * length * length * (fan_in + fan_out)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="no other output exists; accepted for uniformity")
    arguments = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for length, fan_in, fan_out in SHAPES:
        x, g = (jnp.asarray(rng.standard_normal((BATCH, length, n)), jnp.float32) for n in (fan_in, fan_out))
        programs = ways(length, fan_in, fan_out)
        taken = {name: [] for name in programs}
        for number in range(arguments.rounds + 1):
            for name, (run, operations) in programs.items():
                start = time.perf_counter()
                for _ in range(5):
                    jax.block_until_ready(run(x, g))
                if number:
                    taken[name].append((time.perf_counter() - start) / operations)
        cost = {name: statistics.median(seconds) for name, seconds in taken.items()}
        relative = {name: cost[name] / cost["product"] for name in ("instantiate", "gram")}
        rows.append({"rows": length, "fan_in": fan_in, "fan_out": fan_out} | relative)
    content = {"rows": rows} | {name: statistics.median(row[name] for row in rows) for name in ("instantiate", "gram")}
    hardware = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0))}
    print(
        json.dumps(content | {"versions": {"jax": importlib.metadata.version("jax")}, "hardware": hardware}, indent=1)
    )


if __name__ == "__main__":
    main()
