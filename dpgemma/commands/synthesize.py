"""dpgemma synthesize: a corpus of text sampled from a run's model, which may be shared as far as the model may."""

import dataclasses
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from accounting.errors import InputError
from dpgemma.choices import SEQUENCE
from dpgemma.commands import command_flags, places
from dpgemma.data.text import prompts as prompts_lib
from dpgemma.gemma.synthesis_settings import Prompts, SynthesisSettings
from dpgemma.storage.objects import is_address

if TYPE_CHECKING:
    from dpgemma.inference.models import TrainedModel
    from dpgemma.inference.similarity import Similarity

DESCRIPTION = "Sample a corpus from the latest checkpoint of a run. Run the same command again to go on."
# It changes no text.
_FREE = ("batch_size", "num_records")


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string("init_from", None, "Where the model lies that the run started from, if it has moved.", fv)
    command_flags.string("out", None, "File of JSON lines to write; a card is written beside it (.md).", fv)
    command_flags.string(
        "prompts",
        None,
        "Public prompts, one of which every record answers: a file with one on each line, or JSON lines with prompt and"
        " perhaps weight. Never take them from the private data. Omitted, they and their weights are those of the run's"
        " `prompt_histogram`, if it has one.",
        fv,
    )
    command_flags.switch("chat", "Puts prompts into a user's turn of Gemma's markup.", fv)
    command_flags.define_from_dataclass(SynthesisSettings, fv)
    command_flags.string(
        "compare",
        None,
        "Real records to compare with, also a corpus that is complete; figures of them are private, and go to your"
        " terminal and to private/.",
        fv,
    )
    command_flags.string("text_field", "text", "Field of --compare's records that holds the text.", fv)


def run(fv: flags.FlagValues) -> int:
    given: dict[str, Any] = {field.name: fv[field.name].value for field in dataclasses.fields(SynthesisSettings)}
    settings = SynthesisSettings(**given)
    if not fv.workdir:
        raise InputError("say which run to sample from: `workdir`=FOLDER")
    if not fv.out:
        raise InputError("say where to write: `out`=FILE.jsonl")
    out = pathlib.Path(fv.out)
    if out.suffix != ".jsonl":
        raise InputError(f"`out`={out} must end in .jsonl")
    if out.absolute().is_relative_to(pathlib.Path(fv.workdir).absolute()):
        raise InputError(f"`out`={out} lies in the run's folder, where an audit would not know it: give another place")
    prompts = Prompts(*prompts_lib.read(pathlib.Path(fv.prompts), "prompts"), fv.chat) if fv.prompts else None
    from dpgemma.commands import process, progress
    from dpgemma.gemma.synthesis import Filter, Sampler, records
    from dpgemma.inference import models
    from dpgemma.inference.corpus import Corpus, card_of, counted_prompts, locked

    with places.for_reading(fv.workdir) as folder, locked(out):
        with progress.phase("reading the model"):
            model = models.load(str(folder), fv.init_from)
        private = None if is_address(fv.workdir) else folder
        if fv.compare and Corpus.is_complete(out):
            _compare(out, fv.compare, fv.text_field, private, model)
            return 0
        if prompts is None:
            prompts = counted_prompts(model, fv.chat) or Prompts()
        if prompts.texts and not fv["keep_duplicates"].present:
            given["keep_duplicates"] = True
            settings = SynthesisSettings(**given)
        if fv.chat and not prompts.texts:
            raise InputError("`chat` needs `prompts`, which stand in the user's turns")
        config = model.run.config()
        packed = config["privacy_unit"] == SEQUENCE
        sampler = Sampler(
            model.config,
            model.parameters,
            model.require_tokenizer(),
            settings,
            prompts,
            packed=packed,
            across_documents=config.get("attend_across_documents", True),
            # What is longer than a row was never seen by packed text, or by a model from random weights.
            context=config["sequence_length"] if packed or not config["init_from"] else None,
        )
        fixed = {name: value for name, value in given.items() if name not in _FREE}
        identity = {"checkpoint": model.ledger_head, "prompts": dataclasses.asdict(prompts), **fixed}
        kept = Filter(settings)
        corpus = Corpus.opened(out, identity, kept)
        with process.stop_on_signal() as stopped, progress.phase("sampling", settings.num_records) as advance:
            advance(corpus.records)
            for sampled, found in records(sampler, settings, kept, corpus.candidates, corpus.records):
                corpus.add(sampled, found, kept)
                advance(len(found))
                if stopped():
                    print(f"stopped at {corpus.records} records; the same command goes on from here", file=sys.stderr)
                    return 0
        corpus.finish(card_of(model, corpus))
        left_out = ", ".join(f"{number} {reason}" for reason, number in corpus.left_out.items() if number)
        print(f"wrote {out}: {corpus.records} records of {corpus.candidates} sampled ({left_out or 'all kept'})")
        print(f"wrote {corpus.card}, the card that says what holds for it")
        if fv.compare:
            _compare(out, fv.compare, fv.text_field, private, model)
    return 0


def _compare(
    out: pathlib.Path, real: str, text_field: str, workdir: pathlib.Path | None, model: "TrainedModel"
) -> None:
    """Says how like and how near the corpus is to real records: for the operator.

    Args:
      workdir: in whose private/ figures are kept; None for a terminal alone.
      model: whose features MAUVE takes.
    """
    from accounting import run_files
    from dpgemma.commands import progress
    from dpgemma.inference import mauve_score, models, similarity

    length = models.sequence_length(model)

    def score(some: list[str], others: list[str]) -> float | None:
        return mauve_score.score(model, some, others, length)

    with progress.phase("comparing"):
        found, halves = similarity.compare(
            str(out), real, text_field, score=score if mauve_score.is_installed() else None
        )
    kept = workdir is not None and (workdir / run_files.PRIVATE).is_dir()
    if workdir is not None and kept:
        path = workdir / run_files.PRIVATE / "synthesis.jsonl"
        figures = {"corpus": out.name, **dataclasses.asdict(found), "halves": dataclasses.asdict(halves)}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(json.dumps(figures) + "\n")
    if sys.stderr.isatty():
        print(_text(found, halves, real), file=sys.stderr)
    elif kept:
        print("private/synthesis.jsonl says how near the corpus is to the real records", file=sys.stderr)


def _text(found: "Similarity", halves: "Similarity", real: str) -> str:
    def line(name: str, one: float, other: float) -> str:
        return f"  {name:<28}{one:>8.4f}{other:>10.4f}"

    return "\n".join(
        [
            f"private: compared with {real}, and one half of that with the other",
            f"  {'':<28}{'corpus':>8}{'half':>10}",
            line("distance of words", found.words, halves.words),
            line("distance of pairs of words", found.pairs, halves.pairs),
            line("distance of 4 characters", found.characters, halves.characters),
            line(
                "share of near-copies", found.near_copies / found.records, halves.near_copies / max(1, halves.records)
            ),
            *([] if found.mauve is None or halves.mauve is None else [line("MAUVE", found.mauve, halves.mauve)]),
        ]
    )
