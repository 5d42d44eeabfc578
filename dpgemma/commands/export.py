"""dpgemma export: writes a run's latest checkpoint, or a Hugging Face directory anew, as a Hugging Face directory."""

import pathlib

from absl import flags

from accounting.errors import InputError
from dpgemma import choices
from dpgemma.commands import command_flags, places

DESCRIPTION = "Write the latest checkpoint of a run as a Hugging Face directory (or adapters in PEFT's format)."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string(
        "init_from", None, "Hugging Face directory to write anew; with --workdir, where the model lies that the run"
                           " started from.", fv
    )  # fmt: skip
    command_flags.string("out", None, "Folder to write; must not exist or be empty.", fv)
    command_flags.switch("merge", "Adds a run's adapters into the weights and writes a whole model.", fv)
    command_flags.choice(
        "dtype", choices.AS_STORED, choices.EXPORT_DTYPES, "Type of the written weights; merged are float32.", fv
    )


def run(fv: flags.FlagValues) -> int:
    if not fv.out:
        raise InputError("say where to write: --out=FOLDER")
    if not (fv.workdir or fv.init_from):
        raise InputError(
            "say which model to write: --workdir=FOLDER of a run, or --init_from=FOLDER in Hugging Face format"
        )
    out = pathlib.Path(fv.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another --out")
    from ml_dtypes import bfloat16

    from dpgemma.inference import exporting
    from dpgemma.inference import models as trained

    dtype = {choices.AS_STORED: None, "float32": "float32", "bfloat16": bfloat16}[fv.dtype]
    if not fv.workdir:
        if fv.merge:
            raise InputError("--merge merges the adapters of a run: give its --workdir, or drop --merge")
        exporting.export_directory(trained.load_directory(fv.init_from, with_tokenizer=False), out, dtype)
        print(f"wrote {fv.out}")
        return 0
    with places.for_writing(fv.workdir) as (folder, mirror):
        model = trained.load(str(folder), fv.init_from, with_base=fv.merge, mirror=mirror)
        if fv.merge and model.config.lora is None:
            raise InputError(f"{fv.workdir} trained no adapters: drop --merge")
        if dtype is not None and model.config.lora is not None and not fv.merge:
            raise InputError("adapters are written in float32: drop --dtype, or add --merge")
        exporting.export_run(model, out, merge=fv.merge, dtype=dtype)
    print(f"wrote {fv.out} (step {model.step})")
    return 0
