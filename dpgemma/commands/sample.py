"""dpgemma sample: generates text from a run's latest checkpoint or a Hugging Face directory."""

import sys

from absl import flags

from accounting.errors import InputError
from dpgemma.commands import command_flags

DESCRIPTION = "Generate text from the latest checkpoint of a run, or from a Hugging Face directory."


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("workdir", None, "Folder of the run.", fv)
    command_flags.string(
        "init_from", None, "Hugging Face directory; with --workdir, where the model lies that the run started from.", fv
    )
    command_flags.string("tokenizer", None, "Tokenizer for a directory that has none, as for train.", fv)
    command_flags.strings("prompt", "Text to continue; may be given several times.", fv)
    command_flags.switch(
        "chat", "Puts each prompt into a user turn of Gemma's chat markup and prints the answer alone.", fv
    )
    command_flags.count("max_new_tokens", 120, "Most tokens to generate.", fv)
    command_flags.number(
        "temperature", 1.0, "0 takes the likeliest token, 1 samples from the model's distribution.", fv
    )
    command_flags.count("top_k", None, "Only the k likeliest tokens.", fv)
    command_flags.number("top_p", 1.0, "Only the likeliest tokens whose probabilities together reach p.", fv)
    command_flags.count("seed", 0, "Seed of the sampling.", fv)
    command_flags.choice("dtype", "float32", ("float32", "bfloat16"), "Type of activations and matrix products.", fv)


def run(fv: flags.FlagValues) -> int:
    if fv.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens must be at least 1, got {fv.max_new_tokens}")
    if not (fv.workdir or fv.init_from):
        raise InputError(
            "say which model to use: --workdir=FOLDER of a run, or --init_from=FOLDER in Hugging Face format"
        )
    if fv.workdir and fv.tokenizer:
        raise InputError("a run brings its own tokenizer: drop --tokenizer")
    import jax.numpy as jnp
    import numpy as np

    from dpgemma.data.text import chat
    from dpgemma.data.text import tokenizer as tokenizer_lib
    from dpgemma.gemma import generation
    from dpgemma.inference import models as trained

    try:
        sampling = generation.Sampling(fv.temperature, fv.top_k, fv.top_p, fv.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    model = trained.load(fv.workdir, fv.init_from) if fv.workdir else trained.load_directory(fv.init_from, fv.tokenizer)
    texts = fv.prompt or [""]
    encode = (
        (lambda text: chat.prompt(model.tokenizer, text))
        if fv.chat
        else lambda text: model.tokenizer.encode(tokenizer_lib.utf8(text))
    )
    prompts = [np.concatenate([[model.tokenizer.bos], encode(text)]).astype(np.int32) for text in texts]
    tokenizer_lib.check_ids(np.concatenate(prompts), model.config.vocab_size)
    longest = max(map(len, prompts))
    if longest + fv.max_new_tokens > model.config.max_length:
        raise InputError(
            f"{longest} prompt tokens and --max_new_tokens={fv.max_new_tokens} exceed the model's context of"
            f" {model.config.max_length}: shorten one of them"
        )
    answers = generation.generate(
        model.config, model.parameters, prompts, fv.max_new_tokens, sampling, stop=model.stop, dtype=jnp.dtype(fv.dtype)
    )
    for text, answer in zip(texts, answers, strict=True):
        written = model.tokenizer.decode(answer)
        sys.stdout.write(
            (written if fv.chat else tokenizer_lib.utf8(text) + written).decode("utf-8", errors="replace") + "\n"
        )
    return 0
