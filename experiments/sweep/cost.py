"""Estimates what the rest of a sweep costs.

Floating-point operations follow from a rule; hours from what finished runs took, or from a trial on this machine.

python -m experiments.sweep.cost SETTINGS     # the trial, in a process of its own that has a worker's cores and threads
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from dpgemma.choices import AUTO
from dpgemma.training.settings import Settings
from experiments.sweep import launchers
from experiments.sweep.checks import devices, operations
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid, Run

# The settings that decide how long a unit takes.
_SHAPE = (
    "model",
    "sequence_length",
    "dtype",
    "remat",
    "attention",
    "mesh",
    "clipping",
    "microbatch_size",
    "clip_scaling",
    "clip_thresholds",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the rest of a sweep costs.

    Attributes:
      runs: of the grid.
      pending: those that are left.
      flops: of those, 6 M B S T each.
      slots: processes at once.
      hours: of wall-clock time in that many slots; None where a model cannot be tried on this machine.
      seconds_per_unit: of one slot, for each model that is left; the mean over its runs where they differ in shape.
      basis: where these come from, in a sentence.
    """

    runs: int
    pending: int
    flops: float
    slots: int
    hours: float | None
    seconds_per_unit: dict[str, float | None]
    basis: str

    def text(self) -> str:
        hours = "unknown" if self.hours is None else f"{self.hours:.3g}"
        units = [
            f"  {model}: {'unknown' if s is None else f'{s:.3g}'} seconds a unit"
            for model, s in self.seconds_per_unit.items()
        ]
        return "\n".join(
            [
                f"{self.pending} of {self.runs} runs are left: {self.flops:.4g} floating-point operations (6 M B S T),"
                f" {hours} hours in {self.slots} slots",
                *units,
                self.basis,
            ]
        )


def estimate(folder: SweepFolder, grid: Grid, everything: Grid, pending: Sequence[Run], slots: int) -> Cost:
    """The cost of those runs.

    Args:
      everything: all runs of the folder, of which the finished ones say how long they took.
    """
    taken = _of_finished(folder, everything)
    tried = _trial([run for run in pending if run.config.model not in taken])
    seconds = {run.id: taken.get(run.config.model, tried.get(_shape(run.config))) for run in pending}
    models = dict.fromkeys(run.config.model for run in pending)
    known = all(value is not None for value in seconds.values())
    return Cost(
        runs=len(grid.runs),
        pending=len(pending),
        flops=float(sum(map(operations, pending))),
        slots=slots,
        hours=sum(seconds[run.id] * _units(run) for run in pending) / slots / 3600 if known else None,
        seconds_per_unit={
            model: _mean([seconds[run.id] for run in pending if run.config.model == model]) for model in models
        },
        basis=_basis([model for model in models if model in taken], [model for model in models if model not in taken]),
    )


def _units(run: Run) -> int:
    return run.config.steps * run.config.batch_size


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _of_finished(folder: SweepFolder, everything: Grid) -> dict[str, float]:
    """Seconds a unit of each model of which a run is done, start and compilation included."""
    seconds, units = {}, {}
    for run in everything.runs:
        result = folder.result(run) if folder.is_done(run) else {}
        if steps := result.get("steps_in_seconds", run.config.steps if "seconds" in result else 0):
            model = run.config.model
            seconds[model] = seconds.get(model, 0.0) + result["seconds"]
            units[model] = units.get(model, 0) + steps * run.config.batch_size
    return {model: seconds[model] / units[model] for model in seconds}


def _shape(config: Settings) -> str:
    return json.dumps({name: getattr(config, name) for name in _SHAPE})


def _trial(runs: Sequence[Run]) -> dict[str, float | None]:
    """Times a trial of each shape on this machine; returns seconds per unit by shape, None where it fails."""
    if not runs:
        return {}
    cores = max(map(devices, runs))
    available = sorted(os.sched_getaffinity(0))[:cores] if hasattr(os, "sched_getaffinity") else []
    shapes = list(dict.fromkeys(_shape(run.config) for run in runs))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep.cost", *shapes],
        env=launchers.environment(available) | {"DPGEMMA_ENDS_WITH_INPUT": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = json.loads(done.stdout) if done.returncode == 0 else [None] * len(shapes)
    return dict(zip(shapes, seconds, strict=True))


def _basis(taken: list[str], tried: list[str]) -> str:
    """Where the seconds come from."""
    parts = []
    if taken:
        parts.append(
            f"for {', '.join(taken)} from what this sweep's finished runs took, start and compilation included"
        )
    if tried:
        parts.append(
            f"for {', '.join(tried)} from a trial of the gradient on this machine, one core for each device; start,"
            " compilation and what else a step does are not included"
        )
    return f"The time is {'; '.join(parts)}." if parts else "Nothing is left to do."


def main(shapes: list[str]) -> int:
    from dpgemma.commands import process
    from dpgemma.sharding import mesh as mesh_lib
    from dpgemma.training import clipping_choice
    from dpgemma.training.prepare import objective_of
    from experiments.sweep import worker

    worker.settle()
    seconds = []
    for shape in shapes:
        config = Settings(**json.loads(shape))
        process.split_cpu(config.mesh)
        way = (
            clipping_choice.CANDIDATES[0] if config.clipping == AUTO else (config.clipping, config.microbatch_size or 1)
        )
        (trial,) = clipping_choice.measure(objective_of(config), mesh_lib.resolve(config.mesh), [way])
        # Devices take their units at the same time.
        seconds.append(None if trial.refused else trial.seconds / devices(Run(config)))
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
