"""What the live epsilon of the progress bar costs, as a share of the training time of the same run.

Trains a small model as the command line does, then asks for the epsilon of every step of it, as the run did, and times
that against the time from the first step to the last. Prints one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import time

from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from dpgemma.training.observers import Private, Released, Silent
from dpgemma.training.plan import Plan
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings


class Clock(Silent):
    """An observer that notes when steps are taken."""

    def begin(self, plan: Plan, first_step: int, volume: tuple[str, int]) -> None:
        self.first = self.last = time.perf_counter()

    def step(self, released: Released, private: Private) -> None:
        self.last = time.perf_counter()


def measure(steps: int, batch_size: int) -> dict:
    """The time of a run's steps, and of the same run's epsilons asked for one after the other by a fresh accountant."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps=steps, batch_size=batch_size)
        trainer = prepare(settings, str(pathlib.Path(folder) / "run"), observers=[clock])
        trainer.train()
    delta, accountant = settings.delta, Accountant(trainer.mechanism)
    start = time.perf_counter()
    curve = EpsilonCurve(accountant, delta)
    shown = {t: curve.at(t) for t in range(1, steps + 1)}
    spent = time.perf_counter() - start
    certified = {t: accountant.epsilon(delta, t).upper for t in (1, steps // 3, steps)}
    return {
        "steps": steps,
        "batch_size": batch_size,
        "share_of_training_time": spent / (clock.last - clock.first),
        "never_below_the_certified_bound": all(shown[t] >= e * (1 - 1e-9) for t, e in certified.items()),
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
