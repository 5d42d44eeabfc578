"""Writes a model as a Hugging Face directory: complete, or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from accounting import run_files
from accounting.errors import InputError
from accounting.ledger import events
from accounting.ledger import executed as executed_lib
from accounting.report import card
from accounting.report.content import build
from accounting.report.spending import spent
from dpgemma.data.text.tokenizer import FILES, MODEL_FILE, Tokenizer
from dpgemma.gemma import lora
from dpgemma.gemma.files import config_json, peft, weights
from dpgemma.inference.models import Model, TrainedModel
from dpgemma.training import report_files
from dpgemma.training import run as run_directory

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


def export_run(model: TrainedModel, out: pathlib.Path, *, merge: bool, dtype: Any = None) -> None:
    """Writes a run's model, with a card whose privacy section is the run's report, and enters it into the run's ledger.

    Adapters are written alone, in PEFT's format, unless they are merged into the weights that they belong to.

    Formal guarantee: the card's epsilon is that of a ledger to which the written parameters' checkpoint is bound.
    Tested by tests/training/finetune_test.py::test_a_foreign_checkpoint_gets_no_privacy_card.

    Raises:
      InputError: the checkpoint belongs to another ledger.
    """
    run = run_directory.open_existing(model.run.path, model.run.mirror)
    assert run is not None, "its checkpoint was read just now"
    assert model.tokenizer is not None
    with contextlib.ExitStack() as stack:
        stack.callback(run.unlock)
        ledger = stack.enter_context(contextlib.closing(run.open_ledger()))
        done = executed_lib.of(ledger.records)
        if done.updates < model.step or not ledger.begins_with(model.ledger_lines, model.ledger_head):
            raise InputError(
                f"checkpoint {model.step} belongs to another ledger than the one with {done.updates} steps: one of them"
                " was cut or exchanged; run dpgemma audit"
            )
        accountant = done.accountant()
        content = build(done, spent(done, accountant), ledger.head)
        with folder(out) as temporary:
            if model.config.lora is not None and not merge:
                base = model.base
                assert base is not None, "adapters belong to a model"
                multimodal = base.is_dir() and config_json.is_multimodal(base)
                peft.save_peft(model.config, model.parameters, temporary, str(base), multimodal=multimodal)
            elif model.config.lora is not None:
                _write_model(model, lora.fold(model.config, model.parameters), temporary, dtype or "float32")
            else:
                _write_model(model, model.parameters, temporary, dtype)
            _write_tokenizer(model.tokenizer.files(), temporary)
            (temporary / run_files.CARD).write_text(card.model_card(run_files.encode(content), model.step))
            # The ledger knows an export before it exists, and every file of it by its hash.
            files = {path.name: run_files.file_digest(path) for path in sorted(temporary.iterdir())}
            ledger.append(events.EXPORT, step=model.step, files=files)
            ledger.sync()
        report_files.write(run, ledger, accountant, with_page=done.finished)


def export_directory(model: Model, out: pathlib.Path, dtype: Any = None) -> None:
    """Writes the model of a Hugging Face directory anew: the text decoder alone, in one spelling, with the tokenizer
    files there are.
    """
    base = model.base
    assert base is not None, "the model came from a directory"
    with folder(out) as temporary:
        _write_model(model, model.parameters, temporary, dtype)
        _write_tokenizer([base / name for name in FILES if (base / name).is_file()], temporary)
        (temporary / run_files.CARD).write_text(card.plain_card())


def _write_model(model: Model, parameters: dict[str, Any], directory: pathlib.Path, dtype: Any) -> None:
    known = config_json.special_ids(model.base) if model.base is not None and model.base.is_dir() else {}
    ids = known if model.tokenizer is None else _special_ids(model.tokenizer, known)
    weights.save(model.config, parameters, directory, dtype)
    content = config_json.to_hf_config(
        model.config, ids, np.dtype(dtype or parameters["embedder"]["embedding"].dtype).name
    )
    (directory / config_json.FILE).write_text(json.dumps(content, indent=1) + "\n")
    generation = model.base / _GENERATION if known and model.base is not None else None
    if generation is not None and ids == known and generation.is_file():
        shutil.copyfile(generation, directory / _GENERATION)
    else:
        (directory / _GENERATION).write_text(json.dumps(ids, indent=1) + "\n")


def _special_ids(tokenizer: Tokenizer, known: dict[str, Any]) -> dict[str, Any]:
    """The ids that the model was trained with; the base's own lists of them stay where they agree."""
    ids = {}
    for name in ("bos", "eos", "pad"):
        own, stated = getattr(tokenizer, name), known.get(f"{name}_token_id")
        agrees = own in stated if isinstance(stated, list) else own == stated
        ids[f"{name}_token_id"] = stated if agrees else own
    return ids


def _write_tokenizer(files: list[pathlib.Path], directory: pathlib.Path) -> None:
    for path in files:
        shutil.copyfile(path, directory / (path.name if path.name in FILES else MODEL_FILE))
    if files and not (directory / _TOKENIZER_CONFIG).exists():
        # Without these two transformers picks no class for some of the families, or leaves out bos.
        settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
        (directory / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
