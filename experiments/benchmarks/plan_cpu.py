"""How far `dpgemma plan --topology=cpu:N` is from runs of `train` on this computer: memory of the process, and time of
a step.

Each configuration is planned and trained in turn, in processes of their own, some rounds; medians are compared. Prints
one JSON object. The largest one takes 6 GiB.

    python -m experiments.benchmarks.plan_cpu
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

CONFIGURATIONS = {
    "tiny": dict(
        model="tiny", sequence_length=128, batch_size=128, mesh="data:2", microbatch_size=1, remat="none", steps=12
    ),
    "ladder_850k": dict(
        model="ladder_850k", sequence_length=256, batch_size=64, mesh="data:1", microbatch_size=4, remat="none", steps=8
    ),
    "gemma3_270m": dict(
        model="gemma3_270m", sequence_length=128, batch_size=4, mesh="data:1", microbatch_size=1, remat="block", steps=4
    ),
}

# Trains as the command does, and notes when each step was done and how many units it had.
TRAIN = """
import json, resource, sys, time
import dpgemma
from dpgemma.commands import process
from dpgemma.training.observers import Silent

class Clock(Silent):
    def __init__(self):
        self.times, self.units = [], []
    def begin(self, *_):
        self.times.append(time.perf_counter())
    def step(self, released, private):
        self.times.append(time.perf_counter())
        self.units.append(private.units)

settings, folder = dpgemma.Settings(**json.loads(sys.argv[1])), sys.argv[2]
process.split_cpu(settings.mesh)
clock = Clock()
dpgemma.prepare(settings, folder, observers=[clock]).train()
seconds = [after - before for before, after in zip(clock.times, clock.times[1:])]
print(json.dumps({"seconds": seconds[1:], "units": clock.units[1:],
                  "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def planned(settings: dict) -> dict:
    """What the plan says."""
    devices = settings["mesh"].partition(":")[2]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "dpgemma", "plan", f"--topology=cpu:{devices}", "--dtype=float32", *flags]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def trained(settings: dict) -> dict:
    """What a run takes; its first step compiles and is left out."""
    given = settings | dict(clipping="example_scan", holdout_fraction=0.01, checkpoint_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRAIN, json.dumps(given), os.path.join(folder, "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(settings: dict, rounds: int) -> dict:
    """Medians over rounds, and ratios of the plan to the runs."""
    plans, runs = zip(*((planned(settings), trained(settings)) for _ in range(rounds)), strict=True)
    # Batches are random: the time of a step is that of the mean batch, which is brought to the expected one.
    per_step = [
        statistics.fmean(run["seconds"]) * settings["batch_size"] / statistics.fmean(run["units"]) for run in runs
    ]
    found = {
        "planned_seconds": statistics.median(plan["seconds_per_step"] for plan in plans),
        "measured_seconds": statistics.median(per_step),
        "planned_bytes": statistics.median(plan["process_bytes"] for plan in plans),
        "measured_bytes": statistics.median(run["bytes"] for run in runs),
    }
    ratios = {name: found[f"planned_{name}"] / found[f"measured_{name}"] for name in ("seconds", "bytes")}
    return found | {f"ratio_of_{name}": round(ratio, 3) for name, ratio in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name holds this word")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="JSON is printed in any case; accepted for uniformity")
    arguments = parser.parse_args()
    chosen = {name: settings for name, settings in CONFIGURATIONS.items() if arguments.only in name}
    content = {name: compared(settings, arguments.rounds) for name, settings in chosen.items()}
    print(json.dumps({"cores": os.cpu_count(), "rounds": arguments.rounds, "configurations": content}))


if __name__ == "__main__":
    main()
