"""dpgemma train: trains a model under a privacy budget; the same command resumes."""

import dataclasses

from absl import flags

from dpgemma.commands import command_flags
from dpgemma.training.settings import TrainConfig

DESCRIPTION = "Train a Gemma under a privacy budget. Run the same command again to resume."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.define_from_dataclass(TrainConfig, fv)
    command_flags.string(
        "workdir", None, "Folder of the run; by default runs/<first 8 digits of the settings' hash>.", fv
    )


def run(fv: flags.FlagValues) -> int:
    config = TrainConfig(**{field.name: fv[field.name].value for field in dataclasses.fields(TrainConfig)})
    from dpgemma.training import environment

    environment.make_deterministic()
    from dpgemma.training.prepare import prepare

    trainer = prepare(config, fv.workdir, epsilon_given=bool(fv["epsilon"].present))
    try:
        bits = trainer.train()
    finally:
        trainer.run.unlock()
    if bits is not None and len(trainer.data.held_out):
        print(f"held-out {bits:.4f} bits/byte")
    return 0
