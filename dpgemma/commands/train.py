"""dpgemma train: trains a model under a privacy budget; the same command resumes."""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from dpgemma.commands import command_flags, peers, process
from dpgemma.training.settings import Settings

DESCRIPTION = "Train a Gemma under a privacy budget. Run the same command again to resume."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.define_from_dataclass(Settings, fv)
    command_flags.string(
        "workdir",
        None,
        "Folder of the run, on a disk or gs://... or s3://...; by default runs/<first 8 digits of the settings' hash>."
        " Several processes share it.",
        fv,
    )
    command_flags.count(
        "profile", 0, "Steps whose trace is written to private/trace, for TensorBoard; the first one is left out.", fv
    )
    command_flags.string(
        "tensorboard",
        None,
        "Folder for TensorBoard's files: epsilon, learning rate, figures of `public_eval_data`. Private ones go to"
        " private/tensorboard.",
        fv,
    )
    command_flags.string(
        "coordinator",
        None,
        "Where several processes train one run: HOST:PORT, which process 0 can open, or auto on Cloud TPU, Slurm, Open"
        " MPI and Kubernetes.",
        fv,
    )
    command_flags.count("num_processes", None, "How many processes there are.", fv)
    command_flags.count("process_id", None, "The number of this process, from 0; 0 keeps the run's record.", fv)
    command_flags.count(
        "num_slices", None, "With mesh=auto: slices among which the devices are divided; TPUs say it themselves.", fv
    )


def run(fv: flags.FlagValues) -> int:
    given: dict[str, Any] = {field.name: fv[field.name].value for field in dataclasses.fields(Settings)}
    settings = Settings(**given)
    with process.temporarily(process.set_deterministic_sums):
        with peers.joined(fv.coordinator, fv.num_processes, fv.process_id) as num_processes:
            process.split_cpu(settings.mesh, num_processes)
            from dpgemma.commands.profiling import Profile
            from dpgemma.commands.tensorboard import TensorBoard
            from dpgemma.commands.terminal import Terminal
            from dpgemma.sharding import mesh
            from dpgemma.training.observers import Observer
            from dpgemma.training.prepare import prepare

            if fv.num_slices is not None:
                settings = settings.replaced(mesh=mesh.resolve(settings.mesh, fv.num_slices))
            terminal, profile = Terminal(), Profile(fv.profile)
            board = TensorBoard(pathlib.Path(fv.tensorboard)) if fv.tensorboard else None
            observers: list[Observer] = [terminal, *([profile] if fv.profile else []), *([board] if board else [])]
            trainer = prepare(settings, fv.workdir, epsilon_given=bool(fv["epsilon"].present), observers=observers)
            profile.folder = trainer.run.private / "trace"
            try:
                if trainer.record.is_kept_here:
                    terminal.keep_log(trainer.run.log_file)
                    if board:
                        board.open(trainer.run.path, trainer.run.private)
                with process.stop_on_signal() as stopped:
                    measured = trainer.train(stopped)
            finally:
                trainer.run.unlock()
                terminal.close()
                if board:
                    board.close()
            if trainer.record.is_kept_here and measured:
                name, value = next(iter(measured.items()))
                print(f"held-out {value:.4f} {name.replace('_per_', '/')}")
    return 0
