"""How fast rows are read from a token cache, and what training from it costs beside training from memory.

Rows of random words are written to a cache in a temporary folder (`--rows` of `--sequence_length`). They are
read in random order, a batch of `--read_batch` at a time, by one thread, after a first round that fills the page cache.
Then two runs of `train`, one from the cache and one from memory, take turns of `--steps` steps; the ratio is that of
their medians. Prints one JSON object.

    python -m experiments.benchmarks.data --rows=200000 --sequence_length=1024
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from dpgemma.commands import process


class _Silent:
    def phase(self, name: str, total: int, unit: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def written(folder: pathlib.Path, rows: int, length: int) -> pathlib.Path:
    """A text file of so many rows of random letters and words, one document on each line."""
    rng = np.random.default_rng(0)
    path = folder / "text.jsonl"
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, int(n))) for n in rng.integers(2, 10, 5000)]
    with open(path, "w") as file:
        written_bytes = 0
        while written_bytes < rows * length:
            text = " ".join(rng.choice(words, 400))
            file.write(json.dumps({"text": text}) + "\n")
            written_bytes += len(text) + 1
    return path


def reads(cache: pathlib.Path, length: int, batch: int, rounds: int) -> list[float]:
    """Rows a second of every round."""
    from dpgemma.data.text import units
    from dpgemma.data.text.pieces import Reading
    from dpgemma.data.text.tokenizer import ByteTokenizer

    found = units.read(str(cache), ByteTokenizer(), Reading("sequence", length, "text"), 260)
    rng, speeds = np.random.default_rng(1), []
    for _ in range(rounds + 1):
        order = rng.permutation(found.units.num_units)
        begin = time.perf_counter()
        for first in range(0, len(order) - batch + 1, batch):
            found.units.read(np.sort(order[first : first + batch]))
        speeds.append((len(order) // batch * batch) / (time.perf_counter() - begin))
    return speeds[1:]


def seconds_of_steps(
    data: dict[str, str], folder: pathlib.Path, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of a step of the runs on each data, which take turns."""
    from dpgemma.training.prepare import prepare
    from dpgemma.training.settings import Settings

    seconds: dict[str, list[float]] = {name: [] for name in data}
    for number in range(arguments.rounds):
        for name in sorted(data, reverse=bool(number % 2)):
            settings = Settings(
                model=arguments.model,
                data=data[name],
                sequence_length=arguments.train_length,
                batch_size=arguments.batch_size,
                steps=arguments.steps,
                epsilon=float("inf"),
                noise_multiplier=1.0,
                clipping="example_scan",
                microbatch_size=1,
                checkpoint_every=10**6,
                holdout_fraction=0.0,
                mesh="data:1",
            )
            trainer = prepare(settings, str(folder / f"{name}{number}"))
            times: list[float] = []

            class Watched:
                def __init__(self, step, times):
                    self.step, self.times, self.noiser = step, times, step.noiser

                def compiled(self, *given):
                    self.step = self.step.compiled(*given)
                    self.memory = self.step.memory
                    return self

                def __call__(self, *given):
                    self.times.append(time.perf_counter())
                    return self.step(*given)

            trainer.dp_step = Watched(trainer.dp_step, times)
            trainer.train()
            trainer.run.unlock()
            # The first step compiles, and the second waits for what was prepared meanwhile.
            seconds[name].append((times[-1] - times[1]) / (len(times) - 2))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sequence_length", type=int, default=1024, help="of the rows that are read")
    parser.add_argument("--read_batch", type=int, default=1024)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train_rows", type=int, default=20_000)
    parser.add_argument("--train_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    process.split_cpu("data:1")
    from dpgemma.data.text import caching
    from dpgemma.data.text.pieces import Reading

    with tempfile.TemporaryDirectory() as name:
        folder, result = pathlib.Path(name), {}
        for part, rows, length in (
            ("read", arguments.rows, arguments.sequence_length),
            ("train", arguments.train_rows, arguments.train_length),
        ):
            (folder / part).mkdir()
            text = written(folder / part, rows, length)
            begin = time.perf_counter()
            reading = Reading("sequence", length, "text")
            made = caching.make(folder / part / "cache", str(text), "byte", reading, os.cpu_count() or 1, _Silent())
            result[f"{part}_rows"] = made.cache.num_rows
            result[f"{part}_rows_written_per_second"] = made.cache.num_rows / (time.perf_counter() - begin)
        result["read_length"] = arguments.sequence_length
        speeds = reads(folder / "read" / "cache", arguments.sequence_length, arguments.read_batch, arguments.rounds)
        result["rows_read_per_second"] = statistics.median(speeds)
        data = {"cache": str(folder / "train" / "cache"), "memory": str(folder / "train" / "text.jsonl")}
        seconds = seconds_of_steps(data, folder, arguments)
        result["seconds_of_a_step"] = {kind: statistics.median(values) for kind, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["cache"], seconds["memory"], strict=True)]
        result["cache_over_memory"] = statistics.median(ratios)
        result["cache_over_memory_range"] = [min(ratios), max(ratios)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
