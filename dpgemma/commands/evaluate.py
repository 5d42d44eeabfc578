"""dpgemma evaluate: how well a run's model, or one in Hugging Face format, predicts the records of a file."""

import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from accounting.errors import InputError
from dpgemma.choices import DTYPES
from dpgemma.commands import command_flags, places
from dpgemma.storage.objects import is_address

if TYPE_CHECKING:
    from dpgemma.inference.evaluating import Evaluation

DESCRIPTION = (
    "Measure a model on records: bits per byte, perplexity, token accuracy. A response is measured without its prompt."
)

_NOT_COVERED = (
    "These figures are facts about the records of {data}: where those are private, keep the figures too. A choice made"
    " by them is covered by no report. --public_data says that the records are nobody's secret."
)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of a run, whose latest checkpoint is measured.", fv)
    command_flags.string(
        "init_from", None, "Hugging Face directory or name on the hub; with --workdir, where its start lies now.", fv
    )
    command_flags.string("tokenizer", None, "Tokenizer for a directory that has none, as for train.", fv)
    command_flags.string("data", None, "Records, as for train: a file, folder or glob.", fv)
    command_flags.string("text_field", "text", "Field of a record that holds the text.", fv)
    command_flags.count(
        "sequence_length", None, "Tokens per row; by default the run's, or 1024 within the model's context.", fv
    )
    command_flags.count("limit", None, "The most records; of more, so many are drawn at random.", fv)
    command_flags.choice("dtype", "float32", DTYPES, "Type of activations and matrix products.", fv)
    command_flags.switch("skip_bad_records", "Leave out records that cannot be read.", fv)
    command_flags.switch("public_data", "Declares that the records are nobody's secret.", fv)
    command_flags.string(
        "per_record", None, "File for the figures of every record, as JSON lines; private/NAME lies in the run's.", fv
    )
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if not (fv.workdir or fv.init_from):
        raise InputError("say which model to measure: `workdir`=FOLDER of a run, or `init_from`=FOLDER")
    if not fv.data:
        raise InputError("say which records to measure it on: give `data`")
    if fv.workdir and fv.tokenizer:
        raise InputError("a run brings its own tokenizer: drop `tokenizer`")
    if fv.limit is not None and fv.limit < 1:
        raise InputError(f"`limit` must be at least 1, got {fv.limit}")
    out = _file_of(fv.per_record, fv.workdir)
    from dpgemma.commands import progress
    from dpgemma.inference import evaluating, models

    with progress.phase("reading the model"):
        if fv.workdir:
            with places.for_reading(fv.workdir) as folder:
                trained = models.load(str(folder), fv.init_from)
                model: models.Model = trained
                length = models.sequence_length(trained)
        else:
            model = models.load_directory(fv.init_from, fv.tokenizer)
            length = min(evaluating.LONGEST_ROW, model.config.max_length)
    found = evaluating.evaluate(
        model,
        fv.data,
        sequence_length=length if fv.sequence_length is None else fv.sequence_length,
        text_field=fv.text_field,
        dtype=fv.dtype,
        limit=fv.limit,
        skip_bad_records=fv.skip_bad_records,
        phase=progress.phase,
    )
    if not fv.public_data:
        print(_NOT_COVERED.format(data=fv.data), file=sys.stderr)
    if out is not None:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in found.of_records)
    print(json.dumps(_as_dict(found, public=fv.public_data)) if fv.json else _text(found, fv.data))
    return 0


def _file_of(name: str | None, workdir: str | None) -> pathlib.Path | None:
    """Where figures of single records go.

    Raises:
      InputError: into the run's folder, but not into its private part.
    """
    if name is None:
        return None
    path = pathlib.Path(name)
    if workdir and path.parts[:1] == ("private",):
        if is_address(workdir):
            raise InputError(f"--per_record={name} would lie at {workdir}: give a file on a disk")
        return pathlib.Path(workdir) / path
    inside = workdir is not None and path.absolute().is_relative_to(pathlib.Path(workdir).absolute())
    if inside and not path.absolute().is_relative_to(pathlib.Path(str(workdir)).absolute() / "private"):
        raise InputError(f"--per_record={name} lies in the public part of the run's folder: give private/{path.name}")
    return path


def _as_dict(found: "Evaluation", *, public: bool) -> dict[str, object]:
    low, high = found.interval
    return {
        "records": found.records, "rows": found.rows, "bits_per_byte": found.bits_per_byte,
        "interval_95": [low, high], "resampled": "rows" if found.resamples_rows else "records",
        "perplexity": found.perplexity, "token_accuracy": found.token_accuracy, "public_data": public,
    }  # fmt: skip


def _text(found: "Evaluation", data: str) -> str:
    low, high = found.interval
    resampled = "rows" if found.resamples_rows else "records"
    return "\n".join(
        [
            f"{data}: {found.records} records in {found.rows} rows",
            f"bits per byte   {found.bits_per_byte:.4f}  (95 %: {low:.4f} to {high:.4f}, by resampling {resampled})",
            f"perplexity      {found.perplexity:.4f}  for each token",
            f"token accuracy  {found.token_accuracy:.4f}",
        ]
    )
