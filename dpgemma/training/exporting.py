"""Writes a model as a Hugging Face directory: complete, or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from accounting import executed as executed_lib
from accounting import report
from accounting.accountant import Accountant
from accounting.errors import InputError
from dpgemma.gemma import hf_config, lora, weights
from dpgemma.gemma.tokenizer import FILES, MODEL_FILE
from dpgemma.training import reporting, run_directory
from dpgemma.training.trained import Model, TrainedModel

_CARD = "README.md"
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


@contextlib.contextmanager
def folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder under a temporary name that becomes `out` when all went well, and disappears otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_run(model: TrainedModel, out: pathlib.Path, *, merge: bool, dtype=None) -> None:
    """Writes a run's model, with a card whose privacy section is the run's report, and enters it into the run's ledger.

    Adapters are written alone, in PEFT's format, unless they are merged into the weights that they belong to.

    Raises:
      InputError: the ledger is behind the checkpoint.
    """
    run = run_directory.open_existing(model.run.path)
    with contextlib.closing(run.open_ledger()) as ledger:
        done = executed_lib.of(ledger.records)
        if done.steps < model.step:
            raise InputError(
                f"the ledger has {done.steps} steps, but the checkpoint {model.step}: the ledger was cut or exchanged; run dpgemma audit"
            )
        accountant = Accountant(done.mechanisms or (done.planned,))
        content = report.build(done, accountant.epsilon(done.delta, done.steps), ledger.head)
        with folder(out) as temporary:
            if model.config.lora is not None and not merge:
                lora.save_peft(model.config, model.parameters, temporary, str(model.base))
            else:
                parameters = lora.fold(model.config, model.parameters) if model.config.lora is not None else model.parameters
                _write_model(model, parameters, temporary, dtype)
            _write_tokenizer(model.tokenizer.files(), temporary)
            (temporary / _CARD).write_text(report.model_card(report.encode(content), model.step))
            # The ledger knows an export before it exists, and every file of it by its hash.
            files = {path.name: report.file_digest(path) for path in sorted(temporary.iterdir())}
            ledger.append("export", step=model.step, files=files)
            ledger.sync()
        reporting.write(run, ledger, accountant, with_page=done.finished)


def export_directory(model: Model, out: pathlib.Path, dtype=None) -> None:
    """Writes the model of a Hugging Face directory anew: the text decoder alone, in one spelling, with the tokenizer files there are."""
    with folder(out) as temporary:
        _write_model(model, model.parameters, temporary, dtype)
        _write_tokenizer([model.base / name for name in FILES if (model.base / name).is_file()], temporary)
        (temporary / _CARD).write_text(report.plain_card())


def _write_model(model: Model, parameters: dict, directory: pathlib.Path, dtype) -> None:
    ids = hf_config.special_ids(model.base) if model.base is not None and model.base.is_dir() else {}
    if model.tokenizer is not None:
        ids = {f"{name}_token_id": getattr(model.tokenizer, name) for name in ("bos", "eos", "pad")} | ids
    weights.save(model.config, parameters, directory, dtype)
    content = hf_config.to_hf_config(model.config, ids, np.dtype(dtype or parameters["embedder"]["embedding"].dtype).name)
    (directory / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    known = model.base / _GENERATION if model.base else None
    if known is not None and known.is_file():
        shutil.copyfile(known, directory / _GENERATION)
    else:
        (directory / _GENERATION).write_text(json.dumps(ids, indent=1) + "\n")


def _write_tokenizer(files: list[pathlib.Path], directory: pathlib.Path) -> None:
    for path in files:
        shutil.copyfile(path, directory / (path.name if path.name in FILES else MODEL_FILE))
    if files and not (directory / _TOKENIZER_CONFIG).exists():
        # Without these two transformers picks no class for some of the families, or leaves out bos.
        settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
        (directory / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
