"""How long devices wait for the program around them between two steps: batches are drawn, read and sent, the ledger is
written, metrics are kept.

The run is that of `train`. A thread notes when a step's result is there; what passes from then until the next step is
handed to the devices is time that they wait. Prints one JSON object.

    python -m experiments.benchmarks.loop --model=tiny --batch_size=256
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time

import jax

from dpgemma.commands import process
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings


class Watched:
    """A training step that notes when it is handed over and when its result is there."""

    def __init__(self, step):
        self.step, self.handed_over, self.done, self.watchers = step, [], [], []

    def __getattr__(self, name):
        return getattr(self.step, name)

    def __call__(self, *arguments):
        self.handed_over.append(time.perf_counter())
        result = self.step(*arguments)
        self.watchers.append(threading.Thread(target=self._wait_for, args=(result[1],)))
        self.watchers[-1].start()
        return result

    def _wait_for(self, stats):
        jax.block_until_ready(stats)
        self.done.append(time.perf_counter())

    def share_waited(self) -> float:
        """Of the time from the first step's end to the last one's: the first compiles."""
        for watcher in self.watchers:
            watcher.join()
        waited = sum(after - before for before, after in zip(self.done, self.handed_over[1:], strict=False))
        return waited / (self.done[-1] - self.done[0])


def measure(settings: Settings, folder: pathlib.Path) -> tuple[float, float]:
    """The share of time that devices wait, and seconds of a step."""
    trainer = prepare(settings, str(folder))
    trainer.dp_step = watched = Watched(trainer.dp_step)
    trainer.train()
    share = watched.share_waited()
    return share, (watched.done[-1] - watched.done[0]) / (len(watched.done) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mesh", default="data:1")
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    process.split_cpu(arguments.mesh)
    settings = Settings(
        model=arguments.model, batch_size=arguments.batch_size, steps=arguments.steps, mesh=arguments.mesh,
        clipping="example_scan", microbatch_size=4, checkpoint_every=10**6,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rounds = [measure(settings, pathlib.Path(folder) / str(number)) for number in range(arguments.rounds)]
    content = {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "share_waited": statistics.median(share for share, _ in rounds),
        "share_waited_of_rounds": sorted(share for share, _ in rounds),
        "seconds_per_step": statistics.median(seconds for _, seconds in rounds),
        "versions": {"jax": jax.__version__},
        "hardware": f"{os.cpu_count()} CPU cores",
    }
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
