"""dpgemma export: writes a run's latest checkpoint as a Hugging Face directory."""

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
    from accounting import report
    from accounting.ledger import Ledger
    from dpgemma.gemma import weights
    from dpgemma.gemma.hf_config import SPECIAL_IDS, to_hf_config
    from dpgemma.training import run_directory, trained

    model = trained.load(fv.workdir)
    run = run_directory.open_existing(pathlib.Path(fv.workdir))
    report_content = run.report()
    if report_content["steps"] < model.step:
        raise InputError(
            f"{run.report_file} covers {report_content['steps']} steps, but the checkpoint has {model.step}: its epsilon would be too"
            " small; run the training command again, which rewrites it"
        )
    files = {
        "config.json": json.dumps(to_hf_config(model.config), indent=1) + "\n",
        "generation_config.json": json.dumps(SPECIAL_IDS, indent=1) + "\n",
        "README.md": model_card(report_content, model.step),
    }
    from safetensors.numpy import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        temporary.mkdir()
        save_file(weights.to_hf(model.config, model.parameters), temporary / "model.safetensors", metadata={"format": "pt"})
        for name, text in files.items():
            (temporary / name).write_text(text)
        if hasattr(model.tokenizer, "path"):
            shutil.copyfile(model.tokenizer.path, temporary / "tokenizer.model")
        ledger = Ledger.open(run.ledger_file)
        ledger.append("export", step=model.step, sha256=report.digest(temporary / "model.safetensors"))
        ledger.sync()
        ledger.close()
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"wrote {out} (step {model.step})")
    return 0


def model_card(report: dict, step: int) -> str:
    """README.md of the export: the run's privacy statement and the numbers behind it."""
    rows = [
        "epsilon", "delta", "privacy_unit", "neighbouring_relation", "num_units", "sampler", "expected_batch_size", "max_batch_size",
        "sampling_probability", "noise_multiplier", "clip_norm", "steps", "accountant", "cross_check", "ledger_head",
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {report[name]} |" for name in rows)
    deviations = "\n".join(f"- {line}" for line in report["deviations"]) or "- none"
    unfinished = "" if report["finished"] else f"\nThis is an unfinished run, exported at step {step}.\n"
    return f"""# Model trained with dpgemma
{unfinished}
## Privacy

{report["statement"]}

| | |
|---|---|
{table}

Deviations:

{deviations}
"""
