"""How long devices wait for the program around them between two steps: batches are drawn, read and sent, the ledger is
written, metrics are kept. And what checkpoints cost, which are written while training goes on.

The run is that of `train`. A thread notes when a step's result is there; what passes from then until the next step is
handed to the devices is time that they wait. Checkpoints are written while training goes on, as on accelerators; on a
CPU `train` waits for them. A checkpoint costs what its step and the nine after it take longer than
ten median steps do. Prints one JSON object.

    python -m experiments.benchmarks.loop --model=tiny --batch_size=256
    python -m experiments.benchmarks.loop --batch_size=32 --steps=401 --checkpoint_every=100 --rounds=3
"""

import argparse
import itertools
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
from dpgemma.training.trainer import Trainer

_AFTER = 10


class Watched:
    """A training step that notes when it is handed over and when its result is there."""

    def __init__(self, step):
        self.step, self.handed_over, self.done, self.watchers = step, [], [], []

    def __getattr__(self, name):
        return getattr(self.step, name)

    def compiled(self, *arguments):
        self.step = self.step.compiled(*arguments)
        return self

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

    def shares_of_checkpoints(self, every: int) -> list[float]:
        """What each checkpoint costs, as a share of the steps from one to the next."""
        seconds = [after - before for before, after in itertools.pairwise(self.done)]
        # seconds[i] is that of step i + 2; a checkpoint is saved after step c, before the next one is handed over.
        first = [step - 1 for step in range(every, len(self.done) - _AFTER, every)]
        late = {place for start in first for place in range(start, start + _AFTER)}
        usual = statistics.median(second for place, second in enumerate(seconds) if place not in late)
        return [(sum(seconds[start : start + _AFTER]) - _AFTER * usual) / (every * usual) for start in first]


def measure(settings: Settings, folder: pathlib.Path) -> tuple[float, float, list[float]]:
    """The share of time that devices wait, seconds of a step, and the share of each checkpoint."""
    trainer = prepare(settings, str(folder))
    trainer.dp_step = watched = Watched(trainer.dp_step)
    trainer.train()
    share = watched.share_waited()
    seconds = (watched.done[-1] - watched.done[0]) / (len(watched.done) - 1)
    return share, seconds, watched.shares_of_checkpoints(settings.checkpoint_every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mesh", default="data:1")
    parser.add_argument("--checkpoint_every", type=int, default=10**6)
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    process.split_cpu(arguments.mesh)
    Trainer.waits_for_checkpoints = False
    settings = Settings(
        model=arguments.model, batch_size=arguments.batch_size, steps=arguments.steps, mesh=arguments.mesh,
        clipping="example_scan", microbatch_size=4, checkpoint_every=arguments.checkpoint_every,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rounds = [measure(settings, pathlib.Path(folder) / str(number)) for number in range(arguments.rounds)]
    of_checkpoints = [share for *_, shares in rounds for share in shares]
    content = {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "share_waited": statistics.median(share for share, *_ in rounds),
        "share_waited_of_rounds": sorted(share for share, *_ in rounds),
        "seconds_per_step": statistics.median(seconds for _, seconds, _ in rounds),
        "checkpoint_every": arguments.checkpoint_every,
        "share_of_a_checkpoint": statistics.median(of_checkpoints) if of_checkpoints else None,
        "share_of_each_checkpoint": sorted(of_checkpoints),
        "versions": {"jax": jax.__version__},
        "hardware": f"{os.cpu_count()} CPU cores",
    }
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
