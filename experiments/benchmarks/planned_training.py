"""What a plan is worth: the configuration that the law chooses against the one that is best without privacy, both
trained privately.

    python -m experiments.benchmarks.planned_training --data=tinyshakespeare.txt --compute=5e12

Both runs are the ordinary `dpgemma train`, with the same epsilon, delta, data and compute, and the learning rate that
the law gives for each. The baseline is what one gets by adding noise to the best non-private configuration:
Chinchilla's model size for the compute (the nearest that has a name) and the physical batch of the law's own sweep.
Prints one JSON object.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from dpgemma import user_cache
from experiments.laws import fitting
from experiments.planning import noise, plan
from experiments.planning.optimum import Budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--law", type=pathlib.Path)
    parser.add_argument("--compute", type=float, default=5e12)
    parser.add_argument(
        "--num_units", type=int, default=15_680, help="training rows that the data hold, nine tenths of all"
    )
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each configuration, with new keys")
    settings = parser.parse_args()
    fitted = fitting.of_file(settings.law)
    budget = Budget(settings.compute, settings.num_units, settings.epsilon, settings.delta, fitted.sequence_length)
    configurations = {"planned": planned(fitted, budget), "non_private_optimum": best_without_privacy(fitted, budget)}
    losses = {name: [] for name in configurations}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(settings.repetitions):
            # Side by side, one core each, so that whatever else the machine does meets both.
            running = {
                name: subprocess.Popen(
                    command(configuration, settings, fitted.sequence_length, f"{folder}/{name}_{i}"),
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for name, configuration in configurations.items()
            }
            for name, process in running.items():
                out, _ = process.communicate()
                if process.returncode:
                    sys.exit(f"{name}: the training failed with {process.returncode}")
                losses[name].append(float(out.split()[1]))
    for name, values in losses.items():
        configurations[name]["held_out_bits_per_byte"] = values
    means = {name: statistics.mean(values) for name, values in losses.items()}
    result = {
        "budget": {
            "compute": budget.compute,
            "num_units": budget.num_units,
            "epsilon": budget.epsilon,
            "delta": budget.delta,
        },
        **configurations,
        "margin_bits_per_byte": means["non_private_optimum"] - means["planned"],
        "relative_margin": 1 - means["planned"] / means["non_private_optimum"],
        "largest_difference_between_repetitions": max(max(values) - min(values) for values in losses.values()),
    }
    print(json.dumps(result, indent=1))


def planned(fitted: fitting.FittedLaw, budget: Budget) -> dict:
    """What `dpgemma plan` answers."""
    answer = plan.answer(fitted, plan.Request(budget, relation="zero_out"), user_cache.folder())
    return {
        name: answer[name]
        for name in ("model", "parameters", "expected_batch_size", "steps", "learning_rate", "predicted_loss")
    }


def best_without_privacy(fitted: fitting.FittedLaw, budget: Budget) -> dict:
    """Chinchilla's optimum, trained with the noise that the budget needs."""
    parameters, _ = fitted.non_private.optimum(budget.compute)
    name, size = min(fitted.sizes.items(), key=lambda item: abs(item[1] / parameters - 1))
    batch = round(fitted.physical_batch)
    steps = round(budget.compute / (6 * budget.sequence_length * size * batch))
    sigma = float(
        noise.NoiseSurface(budget.epsilon, budget.delta, user_cache.folder())(steps, batch / budget.num_units)
    )
    place = size, steps, sigma / batch
    return {
        "model": name,
        "parameters": size,
        "expected_batch_size": batch,
        "steps": steps,
        "learning_rate": float(fitted.law.learning_rate(*place)),
        "predicted_loss": float(fitted.law.loss(*place)),
    }


def command(configuration: dict, settings, sequence_length: int, workdir: str) -> list[str]:
    names = {"model": "model", "expected_batch_size": "batch_size", "steps": "steps", "learning_rate": "learning_rate"}
    flags = {flag: configuration[name] for name, flag in names.items()}
    flags |= {
        "data": settings.data,
        "epsilon": settings.epsilon,
        "delta": settings.delta,
        "sequence_length": sequence_length,
    }
    flags |= {
        "schedule": "constant",
        "warmup_steps": 20,
        "mesh": "data:1",
        "clipping": "example_scan",
        "microbatch_size": 4,
    }
    flags |= {"checkpoint_every": 1000, "workdir": workdir}
    return [sys.executable, "-m", "dpgemma", "train", *(f"--{name}={value}" for name, value in flags.items())]


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
