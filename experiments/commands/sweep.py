"""dpgemma sweep CONFIG.toml: runs the grid of a file, each run once; the same command goes on."""

import dataclasses
import json
import math
import pathlib
import shlex
import sys

from absl import flags

from accounting.errors import InputError
from dpgemma import choices
from dpgemma.commands import command_flags, process
from dpgemma.storage.objects import is_address
from experiments.hardware import machines

DESCRIPTION = (
    "Run a grid of trainings and fit the scaling law: dpgemma sweep CONFIG.toml. Run the same command again to go on."
    " Exit code 1: some run failed."
)
POSITIONAL = ("config",)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("config", None, "TOML file of the grid; also given without the flag's name.", fv)
    command_flags.string(
        "workdir",
        None,
        "Folder of the sweep, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, where several machines may give the same"
        " command; by default runs/sweep_<name of the file>.",
        fv,
    )
    command_flags.choice(
        "launcher", "local", choices.LAUNCHERS, "Where processes run: here, as Slurm jobs, or on a Ray cluster.", fv
    )
    command_flags.count("slots", None, "Processes at once; by default one for each GPU or core, under Slurm 16.", fv)
    command_flags.count("runs_per_process", 8, "Most runs that a process executes one after the other.", fv)
    command_flags.count(
        "retries", 2, "How often in a row a run may die without getting further before it counts as failed.", fv
    )
    command_flags.string(
        "slurm_parameters", None, "Parameters of submitit, such as partition=gpu,gres=gpu:1,timeout_min=600.", fv
    )
    command_flags.switch("dry_run", "Print what the runs that are left would cost, and start nothing.", fv)
    command_flags.string(
        "chips", None, "With --dry_run: price the runs on chips such as v5p:4x4x4 or h100:8, and try nothing here.", fv
    )
    command_flags.number("mfu", 0.4, "With --chips: the share of their peak that runs reach, which is assumed.", fv)
    command_flags.number("dollars_per_chip_hour", None, "With --chips: what an hour of one chip costs.", fv)
    command_flags.string(
        "emit",
        None,
        "Write a dpgemma train command for each run that is left to this file (- for standard output), and start"
        " nothing. Their keys are their own, even where the data are public; a later sweep of the same folder takes in"
        " what they have finished.",
        fv,
    )
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if not fv.config:
        raise InputError("say which grid to run: dpgemma sweep CONFIG.toml")
    if fv.emit and (fv.dry_run or fv.json):
        raise InputError(f"--emit writes commands and nothing else: drop --{'dry_run' if fv.dry_run else 'json'}")
    for name, least in (("slots", 1), ("runs_per_process", 1), ("retries", 0)):
        if fv[name].value is not None and fv[name].value < least:
            raise InputError(f"--{name} must be at least {least}, got {fv[name].value}")
    topology = _topology(fv)
    from experiments.sweep import checks, stored_folder
    from experiments.sweep import grid as grid_lib

    config = pathlib.Path(fv.config)
    place = fv.workdir or f"runs/sweep_{config.stem}"
    if fv.emit and is_address(place):
        raise InputError("--emit is for a sweep on a disk: give another --workdir, or drop it")
    grid = grid_lib.read(config)
    checks.check(grid, data=topology is None)  # the price of a grid can be asked for before there are data
    folder, everything = stored_folder.look(place, grid)
    checks.check_sum(everything)
    if fv.dry_run:
        return _dry_run(fv, folder, grid, everything, topology)
    if fv.emit:
        return _emit(fv, pathlib.Path(place), grid)
    return _sweep(fv, place, grid)


def _launcher(fv: flags.FlagValues, folder, grid):
    from experiments.sweep import checks, launchers

    devices = max(map(checks.devices, grid.runs))
    return launchers.make(fv.launcher, fv.slots, folder.logs, devices=devices, slurm_parameters=fv.slurm_parameters)


def _topology(fv: flags.FlagValues) -> machines.Topology | None:
    """The machine that a dry run is priced for."""
    for name in ("mfu", "dollars_per_chip_hour"):
        if fv.chips is None and fv[name].present:
            raise InputError(f"--{name} belongs to --chips: give it too, or drop it")
    if fv.chips is None:
        return None
    if not fv.dry_run:
        raise InputError("--chips prices a sweep that is not run: give --dry_run too, or drop it")
    if not 0 < fv.mfu <= 1:
        raise InputError(f"--mfu must lie between 0 and 1, got {fv.mfu:g}")
    dollars = fv.dollars_per_chip_hour
    if dollars is not None and not 0 <= dollars < math.inf:
        raise InputError(f"--dollars_per_chip_hour must not be negative, got {dollars:g}")
    return machines.accelerators(fv.chips)


def _dry_run(fv: flags.FlagValues, folder, grid, everything, topology: machines.Topology | None) -> int:
    from experiments.sweep import cost, harvest, price

    pending = [run for run in folder.pending(grid) if not harvest.is_finished(folder, run)]
    if topology is not None:
        found = price.of_pending(grid, pending, fv.chips, topology, fv.mfu, fv.dollars_per_chip_hour)
    else:
        slots = fv.slots or _launcher(fv, folder, grid).slots
        found = cost.estimate(folder, grid, everything, pending, slots)
    print(json.dumps(dataclasses.asdict(found)) if fv.json else found.text())
    return 0


def _emit(fv: flags.FlagValues, path: pathlib.Path, grid) -> int:
    from experiments.sweep import folder as folder_lib
    from experiments.sweep import harvest, privacy

    folder, everything = folder_lib.create(path, grid)
    with folder.locked():
        harvest.save_finished(folder, folder.pending(grid))
        commands = [
            shlex.join(["dpgemma", *run.arguments(str(folder.run_folder(run)))]) for run in folder.pending(grid)
        ]
        if commands:
            privacy.write_unfinished(folder, everything)
    text = "".join(command + "\n" for command in commands)
    if fv.emit == "-":
        print(text, end="")
    else:
        pathlib.Path(fv.emit).write_text(text)
    return 0


def _sweep(fv: flags.FlagValues, place: str, grid) -> int:
    from experiments.sweep import stored_folder, sweep

    launcher = _launcher(fv, stored_folder.look(place, grid)[0], grid)
    folder, everything = stored_folder.create(place, grid)
    try:
        with process.interrupt_on_sigterm(), folder.locked():
            outcome = sweep.run(
                folder, grid, everything, launcher, retries=fv.retries, runs_per_process=fv.runs_per_process
            )
    except KeyboardInterrupt:
        done = len(grid.runs) - len(folder.pending(grid))
        raise KeyboardInterrupt(
            f"interrupted with {done} of {len(grid.runs)} runs done; the same command goes on from there"
        ) from None
    law, trials = fit_law(folder, outcome.table)
    folder.publish()
    return report(folder, grid, outcome, law, trials, as_json=bool(fv.json))


def fit_law(folder, table) -> tuple[str | None, list]:
    """Fits the law of a table, and tries it on what was held out: (its file, the trials).

    A table that is too small has no law.

    Both files lie beside the table, which is in a closed folder where the data are private: they hold losses.
    """
    from experiments.laws import fitting, held_out

    if table is None:
        return None, []
    try:
        fitted = fitting.fit(table)
    except InputError as error:
        print(f"no law is fitted: {error}", file=sys.stderr)
        return None, []
    for run in fitted.left_out if folder.public_data else ():
        print(f"not fitted: {run}", file=sys.stderr)
    if fitted.left_out and not folder.public_data:
        print(f"{len(fitted.left_out)} runs are not fitted: law.json says which, and why", file=sys.stderr)
    return save_law(folder, fitted, held_out.trials(fitted, table))


def save_law(folder, fitted, trials: list) -> tuple[str, list]:
    """Writes a law and its trials beside the sweep's table."""
    from experiments.laws import held_out

    path = folder.results_file.with_name("law.json")
    fitted.save(path)
    if trials:
        path.with_name("held_out.txt").write_text(held_out.text(trials) + "\n")
    return str(path), trials


def report(folder, grid, outcome, law: str | None, trials: list, *, as_json: bool) -> int:
    """Prints what a sweep has done, and returns the exit code. Losses of private data are not printed."""
    from experiments.laws import held_out

    runs = {run.id: run for run in grid.runs}
    for name, reason in outcome.failed.items():
        c = runs[name].config
        what = (
            f"{c.model}, noise_batch_ratio {runs[name].noise_batch_ratio:g}, learning_rate {c.learning_rate:g},"
            f" {c.steps} steps"
        )
        print(f"dpgemma: run {name} ({what}): {reason}", file=sys.stderr)
    done = len(runs) - len(outcome.failed)
    table = None if outcome.table is None else str(folder.results_file)
    if as_json:
        facts = {
            "runs": len(runs),
            "done": done,
            "failed": outcome.failed,
            "table": table,
            "report": str(folder.report_file),
        }
        shown = [{**dataclasses.asdict(trial), "error": trial.error} for trial in trials] if grid.public_data else None
        print(json.dumps(facts | {"law": law, "held_out": shown, "public_data": grid.public_data}))
    else:
        print(f"{done} of {len(runs)} runs are done; table: {table or 'none yet'}; report: {folder.report_file}")
        if law:
            print(f"law: {law}; ask it with dpgemma plan --law={law}")
        if trials:
            print(
                held_out.text(trials)
                if grid.public_data
                else f"held-out configurations: {pathlib.Path(law).with_name('held_out.txt')}"
            )
    return 1 if outcome.failed else 0
