"""Texts of a reference model, for canaries that look like any other text (Mitchell and Andrew 2026, arXiv
2606.10481).
"""

import pathlib

import numpy as np

from accounting.errors import InputError
from dpgemma.gemma import generation, start
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.files import weights
from dpgemma.gemma.next_token import Sampling

_AT_ONCE = 128


def sampled(
    folder: pathlib.Path,
    model: GemmaConfig,
    count: int,
    length: int,
    *,
    temperature: float,
    bos: int,
    eos: int,
    seeds: np.ndarray,
) -> list[np.ndarray]:
    """Texts as ids, each from bos to its end or to `length` tokens.

    Args:
      folder: Hugging Face directory of the reference model.
      model: the one that is to be trained, with which it shares the vocabulary.
      seeds: int [n], at least one for each 128 texts.

    Raises:
      InputError: a model with another vocabulary.
    """
    reference = start.of_directory(folder).model
    if reference.vocab_size != model.vocab_size:
        raise InputError(
            f"`canary_model`={folder} has {reference.vocab_size} words, and the run's model {model.vocab_size}: give"
            " one with the run's tokenizer"
        )
    parameters = weights.load(reference, folder)
    texts: list[np.ndarray] = []
    for seed in seeds[: -(-count // _AT_ONCE)]:
        sampling = Sampling(temperature=temperature, seed=int(seed))
        prompts = [np.array([bos], np.int32)] * _AT_ONCE
        texts += generation.generate(reference, parameters, prompts, length, sampling, stop=(eos,), prefill=1)
    return texts[:count]
