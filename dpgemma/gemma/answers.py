"""Answers of a model to prompts.

Nothing heavy is imported before `answer` is called, so that --help answers at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accounting.errors import InputError
from dpgemma.gemma.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from dpgemma.data.text.tokenizer import Tokenizer
    from dpgemma.gemma.config import GemmaConfig


def answer(
    config: "GemmaConfig",
    parameters: dict[str, Any],
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    chat: bool = False,
) -> list[str]:
    """The text that follows each prompt, the prompt itself included; in chat, the model's answer alone.

    Args:
      chat: whether to put each prompt into a user turn of Gemma's chat markup.

    Raises:
      InputError: ids that the model does not know, or prompts that leave no room in its context.
    """
    import jax.numpy as jnp
    import numpy as np

    from dpgemma.data.text import chat as chat_lib
    from dpgemma.data.text import tokenizer as tokenizer_lib
    from dpgemma.gemma import generation

    def encode(text: str) -> np.ndarray:
        ids = chat_lib.prompt(tokenizer, text) if chat else tokenizer.encode(tokenizer_lib.utf8(text))
        return np.concatenate([[tokenizer.bos], ids]).astype(np.int32)

    ids = [encode(text) for text in prompts]
    tokenizer_lib.check_ids(np.concatenate(ids), config.vocab_size)
    longest = max(map(len, ids))
    if longest + settings.max_new_tokens > config.max_length:
        raise InputError(
            f"{longest} prompt tokens and `max_new_tokens`={settings.max_new_tokens} exceed the model's context of"
            f" {config.max_length}: shorten one of them"
        )
    end_of_turn = tokenizer.token_id(tokenizer_lib.END_OF_TURN)
    stop = (tokenizer.eos,) if end_of_turn is None else (tokenizer.eos, end_of_turn)
    answers = generation.generate(
        config,
        parameters,
        ids,
        settings.max_new_tokens,
        settings.sampling(),
        stop=stop,
        dtype=jnp.dtype(settings.dtype),
    )
    texts = []
    for text, new in zip(prompts, answers, strict=True):
        written = tokenizer.decode(new)
        texts.append((written if chat else tokenizer_lib.utf8(text) + written).decode("utf-8", errors="replace"))
    return texts
