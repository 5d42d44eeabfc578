"""dpgemma sample: generates text from a run's latest checkpoint or a Hugging Face directory."""

import dataclasses
import sys
from typing import Any

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags, places
from dpgemma.gemma.answers import answer
from dpgemma.gemma.sampling_settings import SamplingSettings

DESCRIPTION = "Generate text from the latest checkpoint of a run, or from a Hugging Face directory."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string(
        "init_from",
        None,
        "Hugging Face directory; with `workdir`, where the model lies that the run started from.",
        fv,
    )
    command_flags.string("tokenizer", None, "Tokenizer for a directory that has none, as for train.", fv)
    command_flags.strings("prompt", "Text to continue; may be given several times.", fv)
    command_flags.switch(
        "chat", "Puts each prompt into a user turn of Gemma's chat markup and prints the answer alone.", fv
    )
    command_flags.define_from_dataclass(SamplingSettings, fv)


def run(fv: flags.FlagValues) -> int:
    given: dict[str, Any] = {field.name: fv[field.name].value for field in dataclasses.fields(SamplingSettings)}
    settings = SamplingSettings(**given)
    if not (fv.workdir or fv.init_from):
        raise InputError(
            "say which model to use: `workdir`=FOLDER of a run, or `init_from`=FOLDER in Hugging Face format"
        )
    if fv.workdir and fv.tokenizer:
        raise InputError("a run brings its own tokenizer: drop `tokenizer`")
    from dpgemma.inference import models

    if fv.workdir:
        with places.for_reading(fv.workdir) as folder:
            model: models.Model = models.load(str(folder), fv.init_from)
    else:
        model = models.load_directory(fv.init_from, fv.tokenizer)
    texts = answer(
        model.config, model.parameters, model.require_tokenizer(), fv.prompt or [""], settings, chat=bool(fv.chat)
    )
    sys.stdout.write("".join(text + "\n" for text in texts))
    return 0
