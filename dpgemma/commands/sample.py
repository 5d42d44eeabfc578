"""dpgemma sample: generates text from a run's latest checkpoint."""

import sys

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags

DESCRIPTION = "Generate text from the latest checkpoint of a run."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string("prompt", "", "Text to continue.", fv)
    command_flags.count("max_new_tokens", 120, "Most tokens to generate.", fv)
    command_flags.number("temperature", 1.0, "0 takes the likeliest token, 1 samples from the model's distribution.", fv)
    command_flags.count("seed", 0, "Seed of the sampling.", fv)


def run(fv: flags.FlagValues) -> int:
    if fv.max_new_tokens < 1 or not fv.temperature >= 0:
        raise InputError("--max_new_tokens must be at least 1 and --temperature at least 0")
    import numpy as np

    from dpgemma.gemma import generation
    from dpgemma.training import trained

    model = trained.load(fv.workdir)
    prompt = fv.prompt.encode()
    ids = np.concatenate([[model.tokenizer.bos], model.tokenizer.encode(prompt)]).astype(np.int32)
    if len(ids) + fv.max_new_tokens > model.config.max_length:
        raise InputError(
            f"{len(ids)} prompt tokens and --max_new_tokens={fv.max_new_tokens} exceed the model's context of"
            f" {model.config.max_length}: shorten one of them"
        )
    new = generation.generate(
        model.config, model.parameters, ids, fv.max_new_tokens,
        temperature=fv.temperature, seed=fv.seed, stop=model.tokenizer.eos, pad=model.tokenizer.pad,
    )  # fmt: skip
    sys.stdout.write((prompt + model.tokenizer.decode(new)).decode("utf-8", errors="replace") + "\n")
    return 0
