"""What the live epsilon of the progress bar costs, as a share of the training time of the same run.

Trains a small model through the command line's own path and times every call that shows epsilon, against the time from
the first step to the last. Prints one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import time


def measure(steps: int, batch_size: int) -> dict:
    from accounting.curve import EpsilonCurve
    from dpgemma.training import prepare
    from dpgemma.training import settings as config_lib
    from dpgemma.training import trainer as loop

    spent, first_and_last = [], []
    at = EpsilonCurve.at

    def timed(curve, step):
        start = time.perf_counter()
        value = at(curve, step)
        end = time.perf_counter()
        spent.append(end - start)
        first_and_last[1:] = [end]
        return value

    take_steps = loop.Trainer._take_steps

    def timed_steps(trainer, *arguments):
        first_and_last[:] = [time.perf_counter()]
        return take_steps(trainer, *arguments)

    EpsilonCurve.at, loop.Trainer._take_steps = timed, timed_steps
    with tempfile.TemporaryDirectory() as folder:
        settings = config_lib.Settings(steps=steps, batch_size=batch_size)
        trainer = prepare.prepare(settings, str(pathlib.Path(folder) / "run"))
        trainer.train()
        certified = [trainer.accountant.epsilon(trainer.config.delta, t).upper for t in (1, steps // 3, steps)]
        curve = EpsilonCurve(trainer.accountant, trainer.config.delta)
        never_below = all(
            at(curve, t) >= e * (1 - 1e-9) for t, e in zip((1, steps // 3, steps), certified, strict=True)
        )
    training = first_and_last[1] - first_and_last[0]
    return {
        "steps": steps,
        "batch_size": batch_size,
        "share_of_training_time": sum(spent) / training,
        "never_below_the_certified_bound": never_below,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="kept for the other benchmarks' sake: JSON is all there is")
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "scipy", "dp-accounting")}
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    print(
        json.dumps(
            {"rows": [measure(arguments.steps, arguments.batch_size)], "versions": versions, "hardware": hardware}
        )
    )


if __name__ == "__main__":
    main()
