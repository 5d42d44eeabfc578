"""dpgemma export: writes a run's latest checkpoint as a Hugging Face directory."""

import contextlib
import json
import os
import pathlib
import shutil

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags

DESCRIPTION = "Write the latest checkpoint of a run as a Hugging Face directory (float32 safetensors)."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string("out", None, "Folder to write; must not exist or be empty.", fv)


def run(fv: flags.FlagValues) -> int:
    if not fv.out:
        raise InputError("say where to write: --out=FOLDER")
    out = pathlib.Path(fv.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another --out")
    from accounting import executed, report
    from accounting.accountant import Accountant
    from dpgemma.gemma import weights
    from dpgemma.gemma.hf_config import SPECIAL_IDS, to_hf_config
    from dpgemma.training import reporting, run_directory, trained

    model = trained.load(fv.workdir)
    run = run_directory.open_existing(pathlib.Path(fv.workdir))
    with contextlib.closing(run.open_ledger()) as ledger:
        done = executed.of(ledger.records)
        if done.steps < model.step:
            raise InputError(
                f"the ledger has {done.steps} steps, but the checkpoint {model.step}: the ledger was cut or exchanged; run dpgemma audit"
            )
        accountant = Accountant(done.mechanisms or (done.planned,))
        content = report.build(done, accountant.epsilon(done.delta, done.steps), ledger.head)
        texts = {
            "config.json": json.dumps(to_hf_config(model.config), indent=1) + "\n",
            "generation_config.json": json.dumps(SPECIAL_IDS, indent=1) + "\n",
            "README.md": report.model_card(report.encode(content), model.step),
        }
        from safetensors.numpy import save_file

        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}.new")
        try:
            temporary.mkdir()
            save_file(weights.to_hf(model.config, model.parameters), temporary / "model.safetensors", metadata={"format": "pt"})
            for name, text in texts.items():
                (temporary / name).write_text(text)
            if hasattr(model.tokenizer, "path"):
                shutil.copyfile(model.tokenizer.path, temporary / "tokenizer.model")
            # The ledger knows an export before it exists, and every file of it by its hash.
            files = {path.name: report.file_digest(path) for path in sorted(temporary.iterdir())}
            ledger.append("export", step=model.step, files=files)
            ledger.sync()
            os.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        reporting.write(run, ledger, accountant, with_page=done.finished)
    print(f"wrote {out} (step {model.step})")
    return 0
