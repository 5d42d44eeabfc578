"""Writes a model as a Hugging Face directory: complete, or not at all."""

import contextlib
import json
import os
import pathlib
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
from dpgemma.data.text import chat, tokenizer_files
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.tokenizer import END_OF_TURN, Tokenizer
from dpgemma.gemma import lora
from dpgemma.gemma.files import config_json, peft, weights
from dpgemma.inference.models import Model, TrainedModel
from dpgemma.storage.appearing import appearing
from dpgemma.training import report_files
from dpgemma.training import run as run_directory

_GENERATION = "generation_config.json"


@contextlib.contextmanager
def folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder of a model, which appears complete, with the rights that new files have."""
    with appearing(out) as temporary:
        yield temporary
        _share_as_others(temporary)


def _share_as_others(directory: pathlib.Path) -> None:
    """Gives all files the rights that new files have; some libraries keep theirs from everybody else."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)


def export(model: Model, out: str | pathlib.Path, *, merge: bool = False, dtype: Any = None) -> None:
    """Writes a model as a Hugging Face directory; a run's with its privacy statement, and entered into its ledger.

    >>> from dpgemma.inference.models import load_directory
    >>> export(load_directory("/nowhere"), "copy")
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: /nowhere is no Hugging Face directory: it has no config.json

    Args:
      out: a folder that does not exist.
      merge: whether adapters are added into the weights that they belong to, in place of being written alone.
      dtype: of the weights; by default as they are.

    Raises:
      InputError: the folder exists, or the model's checkpoint belongs to another ledger.
    """
    path = pathlib.Path(out).absolute()
    if path.exists():
        raise InputError(f"{path} exists: choose another folder")
    if isinstance(model, TrainedModel):
        export_run(model, path, merge=merge, dtype=dtype)
    else:
        export_directory(model, path, dtype)


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
                assert base is not None and model.base_name is not None, "adapters belong to a model"
                multimodal = base.is_dir() and config_json.is_multimodal(base)
                peft.save_peft(model.config, model.parameters, temporary, model.base_name, multimodal=multimodal)
            elif model.config.lora is not None:
                _write_model(model, lora.fold(model.config, model.parameters), temporary, dtype or "float32")
            else:
                _write_model(model, model.parameters, temporary, dtype)
            tokenizer_files.write(model.tokenizer, temporary, model.config.max_length)
            (temporary / run_files.CARD).write_text(card.model_card(run_files.encode(content), model.step))
            # The ledger knows an export before it exists, and every file of it by its hash.
            files = {path.name: run_files.file_digest(path) for path in sorted(temporary.iterdir())}
            ledger.append(events.EXPORT, step=model.step, files=files)
            ledger.sync()
            report_files.write(run, ledger, accountant, with_page=done.finished)


def export_directory(model: Model, out: pathlib.Path, dtype: Any = None) -> None:
    """Writes the model of a Hugging Face directory anew: the text decoder alone, in one spelling, with its tokenizer,
    if it has one.
    """
    base = model.base
    assert base is not None, "the model came from a directory"
    has_tokenizer = any((base / name).is_file() for name in (tokenizer_lib.MODEL_FILE, tokenizer_lib.JSON_FILE))
    tokenizer = tokenizer_lib.load(str(base)) if has_tokenizer else None
    with folder(out) as temporary:
        _write_model(model, model.parameters, temporary, dtype)
        if tokenizer is not None:
            template = tokenizer_files.template_of(base)
            tokenizer_files.write(tokenizer, temporary, model.config.max_length, template)
        (temporary / run_files.CARD).write_text(card.plain_card())


def _write_model(model: Model, parameters: dict[str, Any], directory: pathlib.Path, dtype: Any) -> None:
    known = config_json.special_ids(model.base) if model.base is not None and model.base.is_dir() else {}
    ids = known if model.tokenizer is None else _special_ids(model.tokenizer, known)
    weights.save(model.config, parameters, directory, dtype)
    content = config_json.to_hf_config(
        model.config, ids, np.dtype(dtype or parameters["embedder"]["embedding"].dtype).name
    )
    (directory / config_json.FILE).write_text(json.dumps(content, indent=1) + "\n")
    generation = dict(ids)
    if ids == known and model.base is not None and (model.base / _GENERATION).is_file():
        generation = json.loads((model.base / _GENERATION).read_text())
    if isinstance(model, TrainedModel):
        generation["eos_token_id"] = _ends(model, generation.get("eos_token_id"))
    (directory / _GENERATION).write_text(json.dumps(generation, indent=1) + "\n")


def _ends(model: Model, stated: Any) -> Any:
    """The ids at which a trained model's text ends: those of its base, and the end of a turn, at which answers do."""
    ends = stated if isinstance(stated, list) else [stated]
    tokenizer = model.tokenizer
    turn = tokenizer.token_id(END_OF_TURN) if tokenizer is not None and chat.has_turns(tokenizer) else None
    return stated if turn is None or turn in ends else [*(end for end in ends if end is not None), turn]


def _special_ids(tokenizer: Tokenizer, known: dict[str, Any]) -> dict[str, Any]:
    """The ids that the model was trained with; the base's own lists of them stay where they agree."""
    ids = {}
    for name in ("bos", "eos", "pad"):
        own, stated = getattr(tokenizer, name), known.get(f"{name}_token_id")
        agrees = own in stated if isinstance(stated, list) else own == stated
        ids[f"{name}_token_id"] = stated if agrees else own
    return ids
